"""Trainings that share processors take turns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffkit.engine import turns
from diffkit.engine.turns import Turns

HOLDER = """
import sys, time
from pathlib import Path
from diffkit.engine.turns import Turns
Turns({0}, Path(sys.argv[1])).take()
print("has it", flush=True)
time.sleep(60)
"""


@pytest.fixture
def processors(tmp_path: Path) -> Path:
    """As the kernel shows them."""
    (tmp_path / "cpu0" / "topology").mkdir(parents=True)
    return tmp_path


@pytest.mark.skipif(turns.fcntl is None, reason="no such locks here")
def test_steps_of_two_trainings_never_run_at_once_and_both_go_on(
    processors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SLICE", 0.02)
    steps: list[tuple[float, float, int]] = []
    lock = threading.Lock()

    def training(which: int) -> None:
        with Turns({0, 1}, processors) as turn:
            for _ in range(40):
                turn.take()
                begun = time.monotonic()
                time.sleep(0.004)
                with lock:
                    steps.append((begun, time.monotonic(), which))

    threads = [threading.Thread(target=training, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps.sort()
    assert len(steps) == 80
    between = [(one, two) for one, two in pairwise(steps) if one[2] != two[2]]
    assert all(one[1] <= two[0] for one, two in between)
    assert len(between) > 4  # several slices each, not one after the other


@pytest.mark.skipif(turns.fcntl is None, reason="no such locks here")
def test_one_that_keeps_the_processors_is_waited_for_once_and_its_end_frees_them(
    processors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.3)
    monkeypatch.setattr(turns, "SLICE", 0.0)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, processors], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "has it\n"
        waiting = Turns({0}, processors)
        begun = time.monotonic()
        waiting.take()
        assert time.monotonic() - begun >= 0.3
        begun = time.monotonic()
        for _ in range(10):
            waiting.take()
        assert time.monotonic() - begun < 0.3
        assert not waiting._held
        holder.kill()
    waiting.take()
    assert waiting._held


def test_processes_of_one_training_and_those_on_a_gpu_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for without in (turns.turns(torch.device("cuda")), turns.turns(torch.device("cpu"), processes=2)):
        assert without._turn == -1
        without.take()
    if turns.fcntl is not None and (turns.PROCESSORS / "cpu0" / "topology").exists():
        own = turns.turns(torch.device("cpu"))
        assert own._turn >= 0
        assert own is turns.turns(torch.device("cpu"))  # trainings of one process do not wait for each other
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert turns.turns(torch.device("cpu"))._turn == -1  # two of one thread each have room


def test_without_a_view_of_the_processors_nothing_is_done(tmp_path: Path) -> None:
    turn = Turns({0}, tmp_path / "nowhere")
    turn.take()
    assert not turn._held
