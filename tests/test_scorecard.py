"""The rows of the self-test, a few trials each; `make faults` makes all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from diffkit.selftest import Bench, Row, opened, run_row, scorecard

MOST = 8
SEVERAL = {6: 12, 7: 24, 19: 120, 29: 20, 33: 28}
LONG = bool(os.environ.get("DIFFKIT_LONG"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with opened(tmp_path_factory.mktemp("selftest") / "lab", workers=1) as made:
        yield made


def name(row: Row) -> str:
    return f"{row.number:02}-{re.sub('[^a-z0-9]+', '-', row.title.lower())}"


@pytest.mark.parametrize("row", scorecard(), ids=name)
def test_row(row: Row, bench: Bench) -> None:
    if row.slow and not LONG:
        pytest.skip("takes the good part of a minute: DIFFKIT_LONG=1")
    result = run_row(row, bench, row.full if LONG and row.slow else SEVERAL.get(row.number, MOST), None)
    if result.untestable:
        pytest.skip(result.untestable)
    assert result.trials
    assert not result.wrong
