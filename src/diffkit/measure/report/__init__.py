"""The report of a run: one HTML page that needs nothing else."""

from diffkit.measure.report.page import Facts, page
from diffkit.measure.report.records import Records, read_records

__all__ = ["Facts", "Records", "page", "read_records"]
