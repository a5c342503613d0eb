"""Signals: the first asks, two within a moment are one, a later one ends the process at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffkit.cli import signals
from diffkit.cli.signals import NAMES, Signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, NAMES)}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_is_heard_the_next_within_a_moment_is_not_and_a_later_one_ends_the_process(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda code: heard.append(f"exit {code}"))
    monkeypatch.setattr(signals, "ONE_SIGNAL", 0.05)
    caught = Signals(lambda: heard.append("first"))
    caught.install()
    assert not caught.came
    signal.raise_signal(getattr(signal, name))
    signal.raise_signal(getattr(signal, name))
    assert heard == ["first"] and caught.came
    time.sleep(0.06)
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["first", "exit 130"]


def test_once_the_work_is_done_a_signal_ends_with_the_code_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    caught = Signals(lambda: codes.append(-1))
    caught.install()
    caught.finish(75)
    signal.raise_signal(signal.SIGTERM)
    assert codes == [75]


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard: list[int] = []
    caught = Signals(lambda: heard.append(1))
    caught.install()
    signal.raise_signal(signal.SIGHUP)
    assert heard == []
    signal.raise_signal(signal.SIGTERM)
    assert heard == [1]
    caught.restore()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_an_interruption_that_python_cannot_raise_is_raised_again() -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    signals.interrupting()
    with pytest.raises(KeyboardInterrupt):
        dying = Dying()
        del dying  # the KeyboardInterrupt of its destructor is only reported
        time.sleep(5)


def test_what_is_being_imported_is_there_before_an_interruption_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.1)\nwhole = True\n"
    (tmp_path / "interrupted_module.py").write_text(lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    signals.interrupting()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted_module")
        time.sleep(5)
    assert sys.modules.pop("interrupted_module").whole
    monkeypatch.setattr(signals, "LONGEST_IMPORT", 0.0)
    signals.interrupting()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted_module")
    assert "interrupted_module" not in sys.modules
