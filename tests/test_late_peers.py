"""Which late process hangs: what each says of itself, judged by one that waits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from diffkit.engine import guard, peers
from diffkit.engine.devices import is_memory
from diffkit.engine.distributed import World
from diffkit.engine.peers import OtherFailed, Peers, patience
from diffkit.errors import DiffkitError, ExitCode


class Waiting:
    """A message that the others have not answered; `then` is called whenever a second has passed without."""

    def __init__(self, then: Callable[[int], bool]) -> None:
        self.then, self.seconds = then, 0

    def wait(self, timeout: timedelta) -> None:
        assert timeout == peers.SECOND
        self.seconds += 1
        if not self.then(self.seconds):
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return False


@pytest.fixture
def waiter() -> Iterator[Peers]:
    """Rank 0 of 3; 2 is always in time."""
    found = Peers(HashStore(), 0, 3)
    found._store.set("peer-2", "9 0.0 15 1")
    yield found
    found.close()


def waited(waiter: Peers, of_rank_1: Callable[[int], str], until: int = 10**6) -> int:
    """The seconds until an answer, in each of which rank 1 says this of itself."""

    def then(second: int) -> bool:
        waiter._store.set("peer-1", f"{of_rank_1(second)} 1")
        return second == until

    work = Waiting(then)
    waiter.wait(work)  # type: ignore[arg-type]
    return work.seconds


@pytest.mark.parametrize("may_idle", [2, 15, 600])
def test_one_that_uses_no_processor_time_hangs_after_as_long_as_it_may(waiter: Peers, may_idle: int) -> None:
    assert waited(waiter, lambda second: f"0 7.0 {may_idle}", until=may_idle) == may_idle
    waiter._meetings = 0
    with pytest.raises(OtherFailed, match=f"Rank 1 of 3 hangs.* {may_idle} seconds") as caught:
        waited(waiter, lambda second: f"0 {7 + second / 100} {may_idle}")  # what its idle threads use
    assert caught.value.personal and caught.value.code == ExitCode.OTHER_FAILED


def test_one_that_computes_may_take_long_and_so_may_one_that_computes_again(waiter: Peers) -> None:
    assert waited(waiter, lambda second: f"0 {second * 0.1} 15", until=3000) == 3000
    assert waited(waiter, lambda second: f"0 {second // 14} 15", until=3000) == 3000
    with pytest.raises(OtherFailed, match="hangs"):
        waited(waiter, lambda second: f"0 {min(second, 50)} 15", until=67)


def test_one_that_failed_is_named_by_all_and_only_the_first_speaks() -> None:
    store = HashStore()
    three = [Peers(store, rank, 3) for rank in range(3)]
    try:
        assert [each.fails() for each in three[1:]] == [True, False]
        with pytest.raises(OtherFailed, match="Rank 1 of 3 has failed") as caught:
            three[0].wait(Waiting(lambda second: False))  # type: ignore[arg-type]
        assert caught.value.silent and not caught.value.personal
    finally:
        for each in three:
            each.close()


def test_each_says_where_it_is_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SECOND", timedelta(seconds=0.02))
    store = HashStore()
    world = World(1, 2, Peers(store, 1, 2))
    assert world.peers is not None

    def said() -> tuple[int, float, int]:
        time.sleep(0.1)
        meetings, used, may_idle, _ = store.get("peer-1").split()
        return int(meetings), float(used), int(may_idle)

    world.peers.wait(Waiting(lambda second: True))  # type: ignore[arg-type]
    first = said()
    assert first[0] == 1 and first[2] == peers.IDLE_AT_REST
    end = time.process_time() + 0.3
    items = world.computed(iter("ab"))
    assert next(items) == "a" and said()[2] == peers.IDLE_AT_REST
    with world.computing():
        while time.process_time() < end:
            pass
        second = said()
    assert second[2] == peers.IDLE and second[1] - first[1] > 0.2
    world.peers.close()
    time.sleep(0.1)
    world.peers._meetings = 5
    assert said()[0] == 1


def test_the_first_item_may_wait_and_the_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 2, Peers(HashStore(), 1, 2))
    assert world.peers is not None
    own = world.peers
    allowed = list(world.computed(own._may_idle for _ in range(3)))
    assert allowed == [peers.IDLE_AT_REST, peers.IDLE, peers.IDLE] and own._may_idle == peers.IDLE_AT_REST
    own.close()


class Queued:
    """A message between GPUs."""

    def __init__(self) -> None:
        self.arrived = False

    def is_completed(self) -> bool:
        return self.arrived


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[DiffkitError]:
    """The errors with which the process would have ended."""
    found: list[DiffkitError] = []
    monkeypatch.setattr(guard, "_end", found.append)
    return found


def test_a_message_that_can_no_longer_arrive_ends_the_process_and_a_late_one_does_not(
    ends: list[DiffkitError],
) -> None:
    error = DiffkitError("Rank 1 has failed.")

    def check(seconds: int) -> None:
        asked.append(seconds)
        if broken:
            raise error

    asked, broken = list[int](), False
    watch = guard.Guard()
    watch.look(check)
    assert not asked  # nothing is on its way
    first, last = Queued(), Queued()
    for each in (first, last):
        assert watch.queue(lambda each=each: each) is each  # type: ignore[arg-type,misc,return-value]
    for _ in range(1000):
        watch.look(check)
    assert asked == list(range(1000)) and not ends
    broken = True
    for _ in range(guard.GRACE):
        watch.look(check)
    assert not ends
    last.arrived = True  # at last, and so the state is sound: the next flag says who has failed
    watch.look(check)
    late = Queued()
    watch.queue(lambda: late)  # type: ignore[arg-type,return-value]
    asked.clear()
    for _ in range(guard.GRACE):
        watch.look(check)
    assert asked[0] == 0 and not ends
    watch.look(check)
    assert ends == [error]


def test_connecting_the_gpus_is_watched_too(ends: list[DiffkitError]) -> None:
    def check(seconds: int) -> None:
        raise DiffkitError("Rank 1 has failed.")

    def begin() -> None:
        for _ in range(guard.GRACE + 1):
            watch.look(check)
        raise RuntimeError("aborted")

    watch = guard.Guard()
    with pytest.raises(RuntimeError, match="aborted"):
        watch.queue(begin)
    watch.look(check)
    assert len(ends) == 1


def test_while_a_gpu_waits_one_that_is_silent_has_ended_and_one_that_is_idle_has_not(waiter: Peers) -> None:
    late: dict[int, peers._Seen] = {}
    beats: dict[int, peers._Seen] = {}

    def look(one: str, other: str) -> None:
        waiter._store.set("peer-1", one)
        waiter._store.set("peer-2", other)
        waiter._look_at_others(waiter._store, late, beats)

    for beat in range(100):  # both have queued their parts, and wait for something of no processor time
        look(f"9 7.0 15 {beat}", f"9 7.0 15 {beat // 14}")
    with pytest.raises(OtherFailed, match="Rank 2 of 3 has ended or hangs: it was silent for 15 seconds") as caught:
        for beat in range(100, 120):
            look(f"9 7.0 15 {beat}", "9 7.0 15 99")
    assert caught.value.personal and waiter._error is caught.value


def test_want_of_memory_is_not_taken_for_the_end_of_another(waiter: Peers) -> None:
    class Failed:
        def __init__(self, text: str) -> None:
            self.text = text

        def wait(self, timeout: timedelta) -> None:
            raise RuntimeError(self.text)

        def is_completed(self) -> bool:
            return True

    with pytest.raises(OtherFailed, match=r"Another process has ended .*Connection closed by peer"):
        waiter.wait(Failed("Connection closed by peer [127.0.0.1]"))  # type: ignore[arg-type]
    for text in ("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'", "std::bad_alloc"):
        with pytest.raises(RuntimeError, match=text.splitlines()[0]) as caught:
            waiter.wait(Failed(text))  # type: ignore[arg-type]
        assert is_memory(caught.value)


RANK = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from diffkit.engine import guard
from diffkit.engine.peers import Peers

guard.GRACE = 1

class Never:
    def is_completed(self):
        return False

rank = int(sys.argv[1])
store = TCPStore("127.0.0.1", int(sys.argv[2]), is_master=False, timeout=timedelta(seconds=60))
peers = Peers(store, rank, 2)
store.add("ready", 1)
while store.add("ready", 0) < 2:
    time.sleep(0.1)
with peers.computing():
    if rank == 1:
        os.kill(os.getpid(), 9)
    peers.queue(lambda: Never())
    time.sleep(1000)  # as one whose GPU does not answer
"""


def test_a_process_whose_gpu_waits_for_a_killed_one_ends_soon() -> None:
    """Its part of a message is never sent, and the other's main thread does nothing that could notice."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(store.port)],
            env={**os.environ, peers.PATIENCE: "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in begun]
    assert [process.returncode for process in begun] == [ExitCode.OTHER_FAILED, -9]
    assert said[0].startswith("Error: Rank 1 of 2 has ended or hangs: it was silent for 2 seconds."), said


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "1.5"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.PATIENCE, "40")
    assert patience() == 40
    monkeypatch.setenv(peers.PATIENCE, text)
    with pytest.raises(DiffkitError, match="DIFFKIT_PATIENCE must be a whole number"):
        patience()
