"""Checks for parts: what a plugin's own tests call, and what diffkit's own parts pass.

Each check takes the function itself, then its options, and raises AssertionError with what was wanted and
what came. Nothing here needs a GPU, a data set or pytest; a check takes seconds and leaves torch's global
random state as it was.
"""

from diffkit.testing.backbones import check_backbone
from diffkit.testing.datasets import check_dataset
from diffkit.testing.extractors import check_extractor
from diffkit.testing.levels import check_prediction, check_schedule
from diffkit.testing.samplers import check_sampler
from diffkit.testing.tasks import check_task
from diffkit.testing.trackers import check_tracker
from diffkit.testing.weightings import check_weighting

__all__ = [
    "check_backbone",
    "check_dataset",
    "check_extractor",
    "check_prediction",
    "check_sampler",
    "check_schedule",
    "check_task",
    "check_tracker",
    "check_weighting",
]
