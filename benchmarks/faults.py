"""The long fault campaign: every row of the self-test at full length, about an hour on two cores.

python benchmarks/faults.py               run it; benchmarks/results/faults.json is written after every row
python benchmarks/faults.py --row 7       only this row, whose figures replace those that are there
python benchmarks/faults.py --table       write the table of docs/reliability.md from what is there
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, environment, publish

from diffkit.selftest import opened, run_row, scorecard

FILE = RESULTS / "faults.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, action="append", help="only this row; can be given several times")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="write the table, and run nothing")
    asked = parser.parse_args()
    if asked.table:
        publish("faults", "reliability.md", table(json.loads(FILE.read_text())))
        return
    found = json.loads(FILE.read_text()) if asked.row and FILE.exists() else {"rows": {}}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        opened(Path(folder), asked.workers) as bench,
    ):
        for row in scorecard():
            if asked.row and row.number not in asked.row:
                continue
            result = run_row(row, bench, row.full, None)
            record: dict[str, Any] = {
                **asdict(result),
                "seconds": round(result.seconds, 1),
                "date": time.strftime("%F"),
            }
            found["rows"][str(row.number)] = record
            found = {
                **environment(),
                "workers": asked.workers,
                "rows": dict(sorted(found["rows"].items(), key=by_number)),
            }
            FILE.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            figures = f"{result.trials:,} trials, {len(result.wrong)} wrong, {result.seconds:.0f} s"
            print(f"{row.number:2} {row.title}: {figures}", flush=True)
            for text in result.wrong[:10]:
                print(f"     {text[:300]}", flush=True)
    publish("faults", "reliability.md", table(found))


def by_number(item: tuple[str, Any]) -> int:
    return int(item[0])


def table(found: dict[str, Any]) -> str:
    """In Markdown, a line for each row."""
    lines = ["| row | what is tried | trials | wrong |", "|---|---|---|---|"]
    for row in found["rows"].values():
        wrong = "untestable here" if row["untestable"] else str(len(row["wrong"]))
        title = f"{row['title']}: {row['untestable']}" if row["untestable"] else row["title"]
        lines.append(f"| {row['number']} | {title} | {row['trials']:,} | {wrong} |")
    dates = sorted({row["date"] for row in found["rows"].values()})
    seconds = sum(row["seconds"] for row in found["rows"].values())
    of = f"diffkit {found['diffkit']}, torch {found['torch']}, Python {found['python']}"
    return "\n".join([*lines, "", f"{dates[-1]}, {of}, {seconds / 60:.0f} minutes with {found['workers']} processes."])


if __name__ == "__main__":
    main()
