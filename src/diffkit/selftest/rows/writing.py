"""Kills, signals and failing disks while something is written."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from itertools import groupby

from diffkit.selftest.actions import ACTIONS
from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.operations import Count, Fault, Kind
from diffkit.selftest.powerloss import State, states

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SETTLED = 0.02
"""Seconds after which a command has its handlers of signals; before, Python's own are there."""

REFUSED, STOPPED = {0, 4}, {0, 75, 130}


@row(1, "SIGKILL at every durable operation of train, sample and ema")
def kills(bench: Bench) -> Iterator[Trial]:
    return bench.each(struck, bench.ask(points, ("train", "resume", "sample", "ema"), ("kill", "torn")))


@row(2, "SIGKILL at random times", full=500)
def random_kills(bench: Bench) -> Iterator[Trial]:
    chance = random.Random(2)
    items = ((chance.choice(list(ACTIONS)), "SIGKILL", chance.random()) for _ in range(10_000))
    return bench.each(interrupted, items)


@row(3, "power loss: what was not synced is lost, torn, zeroed or reordered")
def power_loss(bench: Bench) -> Iterator[Trial]:
    found = [(name, state) for name in ACTIONS for state in bench.ask(states, name)]
    random.Random(3).shuffle(found)
    return bench.each(after_power_loss, found)


@row(4, "disk full, or a short write, at every durable operation")
def disk_full(bench: Bench) -> Iterator[Trial]:
    return bench.each(struck, bench.ask(points, tuple(ACTIONS), ("full", "short")))


@row(5, "EIO at every durable operation")
def io_errors(bench: Bench) -> Iterator[Trial]:
    return bench.each(struck, bench.ask(points, tuple(ACTIONS), ("error",)))


@row(9, "SIGINT, SIGTERM, SIGHUP and SIGUSR1 at random times", full=200)
def random_signals(bench: Bench) -> Iterator[Trial]:
    chance = random.Random(9)
    items = ((chance.choice(list(ACTIONS)), chance.choice(SIGNALS), chance.random()) for _ in range(10_000))
    return bench.each(interrupted, items)


@row(10, "SIGTERM at every durable operation of train")
def signals_while_saving(bench: Bench) -> Iterator[Trial]:
    return bench.each(struck, bench.ask(points, ("train", "resume"), ("signal",)))


@row(31, "SIGKILL at every durable operation of prepare")
def kills_of_prepare(bench: Bench) -> Iterator[Trial]:
    return bench.each(struck, bench.ask(points, ("prepare",), ("kill", "torn")))


def points(lab: Lab, names: tuple[str, ...], kinds: tuple[Kind, ...]) -> list[tuple[str, Fault]]:
    """Every operation of these actions, in random order; of many writes in a row to one file the first, the middle and
    the last."""
    found = []
    for name in names:
        lines = operations(lab, name)
        places = {"torn": {"write"}, "short": {"write"}}
        for (operation, *_), group in groupby(enumerate(lines, 1), key=lambda each: each[1].split(" ", 1)):
            numbers = [number for number, _ in group]
            chosen = {numbers[0], numbers[len(numbers) // 2], numbers[-1]} if operation == "write" else set(numbers)
            found += [
                (name, Fault(kind, number))
                for number in sorted(chosen)
                for kind in kinds
                if operation in places.get(kind, {operation})
            ]
    random.Random(1).shuffle(found)
    return found


def operations(lab: Lab, name: str) -> list[str]:
    """What an action does when nothing goes wrong."""
    action, room = ACTIONS[name], ACTIONS[name].begin(lab)
    lab.diffkit(*action.words(lab), here=room, setup=[Count(room / "operations")])
    lines = (room / "operations").read_text().splitlines()
    shutil.rmtree(room)
    return lines


def struck(lab: Lab, name: str, fault: Fault) -> Trial:
    """An action with a fault, and how it recovers."""
    action, room = ACTIONS[name], ACTIONS[name].begin(lab)
    outcome = lab.diffkit(*action.words(lab), here=room, setup=[fault])
    if fault.kind in ("kill", "torn"):
        problem = outcome.unlike({0, -signal.SIGKILL})
    else:
        problem = outcome.unlike(STOPPED if fault.kind == "signal" else REFUSED)
    problem = problem or action.recover(lab, room)
    shutil.rmtree(room)
    return Trial(f"{name}, {fault.kind} at operation {fault.number}", problem)


def interrupted(lab: Lab, name: str, which: str, fraction: float) -> Trial:
    """An action that a signal reaches after a part of the time that it takes."""
    action, room = ACTIONS[name], ACTIONS[name].begin(lab)
    number, after = signal.Signals[which], max(SETTLED, fraction * lab.seconds(name))
    outcome = lab.diffkit(*action.words(lab), here=room, send=(number, after))
    problem = outcome.unlike({0, -number} if which == "SIGKILL" else STOPPED) or action.recover(lab, room)
    shutil.rmtree(room)
    return Trial(f"{name}, {which} after {after:.3f} s", problem)


def after_power_loss(lab: Lab, name: str, state: State) -> Trial:
    """What a power cut left, and how the action recovers from it."""
    action, room = ACTIONS[name], lab.room()
    state.materialise(room)
    problem = action.recover(lab, room, state.durable_images())
    shutil.rmtree(room)
    return Trial(f"{name}, {state.what}", problem)
