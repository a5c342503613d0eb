"""Which late process hangs: what each says of itself, judged by one that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from diffkit.engine import peers
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
    found._store.set("peer-2", "9 0.0 15")
    yield found
    found.close()


def waited(waiter: Peers, of_rank_1: Callable[[int], str], until: int = 10**6) -> int:
    """The seconds until an answer, in each of which rank 1 says this of itself."""

    def then(second: int) -> bool:
        waiter._store.set("peer-1", of_rank_1(second))
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
        meetings, used, may_idle = store.get("peer-1").split()
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


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "1.5"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.PATIENCE, "40")
    assert patience() == 40
    monkeypatch.setenv(peers.PATIENCE, text)
    with pytest.raises(DiffkitError, match="DIFFKIT_PATIENCE must be a whole number"):
        patience()
