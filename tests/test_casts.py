"""Weights cast all together: the numbers of autocast, in fewer operations, and nothing else changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffkit.backbones.unet import unet
from diffkit.engine import casts
from diffkit.engine.casts import CastTogether, cast_together
from diffkit.engine.speed import EAGER, prepared
from diffkit.interfaces import ImageSpec
from fake_cuda import fake_cuda

SPEC = ImageSpec(3, 8, 8)
X, C_NOISE = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8), torch.tensor([0.1, -0.3])


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = unet(SPEC, width=8, multipliers=(1, 2), blocks=1, attention=4, **options)
    with torch.no_grad():
        for parameter in made.parameters():  # some begin with zeros
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def gradients(called: nn.Module, owner: nn.Module, passes: int = 1) -> tuple[Tensor, list[Tensor | None]]:
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    for _ in range(passes):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = called(X, C_NOISE)
        answer.float().square().mean().backward()
    return answer, [parameter.grad for parameter in owner.parameters()]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        assert own is None or other is None or (own.dtype == torch.float32 and torch.equal(own, other))


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"checkpoint": 1}, {"skips": "add", "resample": "plain"}])
def test_gradients_are_those_of_autocast_bitwise(options: dict[str, Any]) -> None:
    """Also in another layout, with dropout (whose first call draws no numbers), and summed over two passes."""
    net = network(**options).to(memory_format=torch.channels_last)
    together = CastTogether(net, net)
    for passes in (1, 2):
        answer, theirs = gradients(net, net, passes)
        found, ours = gradients(together, net, passes)
        assert torch.equal(answer, found)
        same(ours, theirs)
    assert all(type(parameter) is nn.Parameter for parameter in net.parameters())
    assert all(a.stride() == b.stride() for a, b in zip(ours, net.parameters(), strict=True) if a is not None)


def test_all_weights_are_cast_by_one_operation_and_back_by_another() -> None:
    net = network()
    together = CastTogether(net, net)
    gradients(together, net)
    with Count() as plain:
        gradients(net, net)
    with Count() as ours:
        gradients(together, net)
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    apart = {net.stem, net.head[-1], *net.embed.noise.children()}  # which run in float32
    weights = 2 * len([layer for layer in layers if layer not in apart])
    assert weights > 40
    assert plain.names["_to_copy"] - ours.names["_to_copy"] == 2 * weights
    assert ours.names["_foreach_copy_"] == 2
    assert ours.names["clone"] == plain.names["clone"]  # the gradients are taken over, not copied again


def test_large_networks_are_cast_in_pieces_whose_gradients_come_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(casts, "AT_ONCE", 4000)
    net = network()
    together = CastTogether(net, net)
    _, theirs = gradients(net, net)
    same(gradients(together, net)[1], theirs)
    arrived = list[str]()
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))  # type: ignore[misc]
    with Count() as count:
        gradients(together, net)
    assert count.names["_foreach_copy_"] >= 6
    assert arrived.index("decoder.1.blocks.1.conv2.weight") < arrived.index("bottleneck.blocks.0.conv1.weight")
    assert arrived.index("bottleneck.blocks.0.norm1.weight") < arrived.index("encoder.0.blocks.0.conv1.weight")


class Parts(nn.Module):
    """What is left out: weights that others read, frozen ones, those without a part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.last, self.apart = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.frozen(self.first(x))
        self.unused(hidden)
        found = self.last(hidden)
        with torch.autocast("cpu", enabled=False):
            answer: Tensor = self.apart(found.float())
        return answer


def test_only_what_autocast_casts_is_cast_and_the_networks_state_is_its_own() -> None:
    net = Parts()
    together = CastTogether(net, net)
    _, ours = gradients(together, net)
    assert float(net.calls) == 1
    _, theirs = gradients(net, net)
    same(ours, theirs)
    assert {id(module) for module, _ in together._places or ()} == {id(net.first), id(net.unused), id(net.last)}


def test_a_network_that_minds_runs_as_it_is() -> None:
    class Minding(Parts):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return super().forward(x, c_noise) + torch.dot(self.first.bias, torch.ones(4))

    net = Minding()
    together = CastTogether(net, net)
    _, ours = gradients(together, net)
    assert together._places == []
    same(ours, gradients(net, net)[1])


def test_what_a_network_itself_raises_changes_nothing() -> None:
    """As when it cannot be recorded as a CUDA graph."""

    class Refusing(Parts):
        refuses = False

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().forward(x, c_noise)

    net = Refusing()
    together = CastTogether(net, net)
    gradients(together, net)
    net.refuses = True
    with pytest.raises(RuntimeError, match="capturing"):
        gradients(together, net)
    net.refuses = False
    with Count() as count:
        gradients(together, net)
    assert count.names["_foreach_copy_"] == 2


def test_too_little_memory_is_not_hidden() -> None:
    class Hungry(Parts):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    net = Hungry()
    with pytest.raises(torch.OutOfMemoryError):
        gradients(CastTogether(net, net), net)


def test_without_autocast_or_gradients_and_under_transforms_it_is_the_network() -> None:
    net = network()
    together = CastTogether(net, net)
    with Count() as count, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        together(X, C_NOISE)
    together(X, C_NOISE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slope = torch.func.grad(lambda x: together(x, C_NOISE).float().sum())(X)
    assert together._places is None and not count.names["_foreach_copy_"] and slope.shape == X.shape


def test_casts_have_second_derivatives() -> None:
    w = torch.tensor([1.5, -2.0], requires_grad=True)
    (cast,) = cast_together(torch.bfloat16, [w])
    (first,) = torch.autograd.grad((cast.float() ** 3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    assert torch.equal(first, 3 * w.detach() ** 2) and torch.equal(second, 6 * w.detach())


def test_compiled_it_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net = network()
    counter = CompileCounterWithBackend("eager")
    together = CastTogether(net, torch.compile(net, backend=counter, dynamic=False))  # type: ignore[arg-type]
    for _ in range(3):
        _, ours = gradients(together, net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= 0.99
    assert counter.frame_count == 1 and len(ours) > 40


def test_networks_on_a_gpu_are_prepared_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    assert prepared(net, EAGER) is net
    monkeypatch.setattr(nn.Module, "to", lambda module, **_: module)  # fake weights keep their layout
    with fake_cuda(monkeypatch):
        there = nn.Conv2d(3, 3, 1, device="cuda")
        made = prepared(there, EAGER)
    assert isinstance(made, CastTogether) and made.network is there
