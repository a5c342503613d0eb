"""Trials that once went wrong, kept for ever: tests/regressions/trials.json says what each was."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from diffkit.selftest import Bench
from diffkit.selftest.operations import Fault
from test_scorecard import bench  # noqa: F401

TRIALS = json.loads((Path(__file__).parent / "regressions" / "trials.json").read_text())


def name(entry: dict[str, Any]) -> str:
    return f"{entry['trial']}-{'-'.join(map(str, entry['of']))}"


@pytest.mark.parametrize("entry", TRIALS, ids=name)
def test_it_stays_right(entry: dict[str, Any], bench: Bench) -> None:  # noqa: F811
    module, function = entry["trial"].split(":")
    trial = getattr(importlib.import_module(f"diffkit.selftest.rows.{module}"), function)
    arguments = [Fault(**each) if isinstance(each, dict) else each for each in entry["of"]]
    assert not bench.ask(trial, *arguments).problem
