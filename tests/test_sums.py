"""Gradients of two processes, here threads, summed during the backward pass; plain sums are the oracle."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkit.backbones.unet import unet
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import v
from diffkit.core.schedules import cosine, over_range
from diffkit.engine import sums
from diffkit.engine.batches import Batches
from diffkit.engine.distributed import World
from diffkit.engine.sums import GradientSums, grouped
from diffkit.engine.train import Progress, Reduced, State, train
from diffkit.interfaces import ImageSpec
from test_train import SPEC, Memory, recipe, small_network, trained


class Exchange:
    """What two threads have sent: message number k of one is summed with message number k of the other."""

    def __init__(self) -> None:
        self.sent: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.changed = threading.Condition()


class Thread(World):
    """The world as one of the two sees it. Of what is sent, nothing may change before it has been waited for."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "exchange", exchange)
        object.__setattr__(self, "begun", [])  # of each message, whether a backward pass was running

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        exchange: Exchange = self.exchange  # type: ignore[attr-defined]
        own, other = exchange.sent[self.rank], exchange.sent[1 - self.rank]
        with exchange.changed:
            own.append(values.clone())
            exchange.changed.notify_all()
        number = len(own)
        values.fill_(
            torch.nan if values.is_floating_point() else -1
        )  # as if on its way: whoever reads it before it has been waited for is mistaken
        self.begun.append(torch._C._current_graph_task_id() >= 0)  # type: ignore[attr-defined]

        def wait() -> None:
            assert bool((values.isnan() | (values == -1)).all()), "changed while it was on its way"
            with exchange.changed:
                if not exchange.changed.wait_for(lambda: len(other) >= number, timeout=10):
                    raise TimeoutError
            values.copy_(own[number - 1] + other[number - 1])

        return wait


def both(work: Callable[[Thread], object]) -> list[Thread]:
    """Have both do it, each in a thread; raises what either raised."""
    exchange = Exchange()
    worlds = [Thread(rank, exchange) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(work, world) for world in worlds]
    errors = [each.exception() for each in done]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, TimeoutError)):
        raise error
    return worlds


class Net(nn.Module):
    """Layers of several shapes and layouts, one that nothing uses, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 7)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 1)
        self.again = False
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(2):  # each time a backward pass of its own, if reentrant
            x = checkpoint(self.shared, x, use_reentrant=True) if self.again else self.shared(x)
        found: Tensor = self.last(torch.tanh(x))
        return found


NET = Net()


def net(again: bool = False) -> Net:
    """A copy, the same for all: threads share torch's generator."""
    found = copy.deepcopy(NET)
    found.again = again
    return found


def loss(network: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = (network(images) - images).square().sum() / 16
    return found


IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def shares(step: int, rank: int) -> Tensor:
    return IMAGES[8 * rank :][:8].roll(step, 0)


def plain(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Gradients by a backward pass alone; zeros where there is none."""
    network.zero_grad(set_to_none=True)
    loss(network, images).backward()
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in network.parameters()]
    network.zero_grad(set_to_none=True)
    return found


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "LEAST", 25)


@pytest.mark.parametrize("again", [False, True])
def test_the_sums_are_bitwise_those_of_plain_gradients_and_come_in_the_parameters_layout(again: bool) -> None:
    def work(world: Thread) -> None:
        network = net(again)
        parameters = list(network.parameters())
        with GradientSums(parameters, world) as gradients:
            for step in range(3):
                expected = [
                    one + other
                    for one, other in zip(*(plain(net(again), shares(step, rank)) for rank in range(2)), strict=True)
                ]
                for parameter in parameters:
                    parameter.grad = None
                images = shares(step, world.rank)
                with gradients.last_pass():
                    own = loss(network, images)
                    own.backward()
                (total,) = gradients.finish([own.detach()]) or []
                for parameter, wanted in zip(parameters, expected, strict=True):
                    assert parameter.grad is not None and torch.equal(parameter.grad, wanted)
                    assert parameter.grad.stride() == parameter.stride()
                losses = [loss(network, shares(step, rank)).detach() for rank in range(2)]
                assert torch.equal(total, losses[0] + losses[1])
        assert all(not each._post_accumulate_grad_hooks for each in parameters)

    one, other = both(work)
    steps = [one.begun[start : start + len(one.begun) // 3] for start in range(0, len(one.begun), len(one.begun) // 3)]
    assert one.begun == other.begun and len(steps) == 3 and len(steps[0]) == 4
    assert not any(steps[0])  # in the first it is seen which gradients come once
    assert steps[1] == steps[2]
    assert any(steps[1]) == (not again)  # and those that may come again are never sent early
    assert not steps[1][-1]


def test_gradients_of_several_passes_are_sent_with_the_last() -> None:
    def work(world: Thread) -> None:
        network = net()
        with GradientSums(list(network.parameters()), world) as gradients:
            for step in range(2):
                network.zero_grad(set_to_none=True)
                first, last = shares(step, world.rank).split([5, 3])
                loss(network, first).backward()
                before = len(world.begun)  # type: ignore[attr-defined]
                with gradients.last_pass():
                    assert len(world.begun) == before  # type: ignore[attr-defined]
                    loss(network, last).backward()
                gradients.finish([torch.zeros(1)])
        whole = plain(net(), torch.cat([shares(1, 0), shares(1, 1)]))
        for parameter, wanted in zip(network.parameters(), whole, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)

    assert any(both(work)[0].begun)


def test_a_backward_pass_that_adds_to_what_was_sent_is_an_error() -> None:
    def work(world: Thread) -> None:
        network = net()
        with GradientSums(list(network.parameters()), world) as gradients, ExitStack() as stack:
            for again in (False, True):
                network.zero_grad(set_to_none=True)
                network.again = again
                if again:
                    stack.enter_context(pytest.raises(RuntimeError, match="added to after it had been sent"))
                with gradients.last_pass():
                    loss(network, shares(0, 0)).backward()
                gradients.finish([torch.zeros(1)])

    both(work)


def test_one_process_short_of_memory_has_all_try_again_with_smaller_passes() -> None:
    """It fails amid a backward pass, when some of its sums have been sent and others have not."""
    numbers = recipe(batch_size=8, micro_batch=4)
    reference, losses = trained(numbers, 80)
    states = [State(small_network(), numbers) for _ in range(2)]

    class Short(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            raise MemoryError

    def work(world: Thread) -> None:
        calls = 0

        def objective(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            hook = None
            if calls == 4 and world.rank == 1:
                stem = next(module for module in denoiser.network.modules() if isinstance(module, nn.Conv2d))
                hook = stem.register_forward_hook(lambda module, given, found: Short.apply(found))
            try:
                return squared_error(denoiser, clean, s, noise, condition)
            finally:
                if hook is not None:
                    hook.remove()

        state = states[world.rank]
        events = list(
            train(
                state,
                Denoiser(state.network, v),
                Batches(Memory(), SPEC, numbers.seed, flip=True, label_dropout=0.3),
                over_range(cosine, 0.002, 80.0),
                objective,
                numbers,
                until_images=80,
                world=world,
            )
        )
        assert [event.micro_batch for event in events if isinstance(event, Reduced)] == [2]
        found = [event.loss for event in events if isinstance(event, Progress)]
        assert found == pytest.approx(losses, rel=1e-5)
        for a, b in zip(state.network.parameters(), reference.network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    both(work)


def test_messages_are_an_eighth_of_all_within_bounds_and_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "LEAST", 100)
    monkeypatch.setattr(sums, "MOST", 1000)

    def sizes(tensors: Sequence[Tensor]) -> list[int]:
        return [sum(each.numel() for each in group) for group in grouped(tensors)]

    assert sizes([torch.empty(10)] * 25) == [100, 100, 50]
    assert sizes([torch.empty(10)] * 320) == [400] * 8
    assert sizes([torch.empty(10)] * 3200) == [1000] * 32
    assert sizes([torch.empty(5000), torch.empty(10), torch.empty(10)]) == [5000, 20]
    assert sizes([torch.empty(10), torch.empty(10, dtype=torch.float64), torch.empty(10)]) == [10, 10, 10]
    assert sizes([]) == []


def test_the_network_of_a_preset_is_sent_in_some_eight_messages() -> None:
    with torch.device("meta"):
        network = unet(ImageSpec(3, 128, 128), width=96)
    parameters = list(network.parameters())[::-1]
    groups = list(grouped(parameters))
    assert 6 <= len(groups) <= 9
    assert [id(each) for group in groups for each in group] == [id(each) for each in parameters]
