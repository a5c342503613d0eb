"""Vectors made as long as 1: near to what float64 says, with the types, gradients and refusals of torch's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkit.engine import normalize
from diffkit.engine.functions import fast_functions

CPU = torch.device("cpu")
torchs = F.normalize


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of what is not left to torch."""
    found: list[torch.dtype] = []
    unit = normalize._Unit.apply

    class Noted:
        @staticmethod
        def apply(x: Tensor, dim: int, eps: float) -> Tensor:
            found.append(x.dtype)
            result: Tensor = unit(x, dim, eps)
            return result

    monkeypatch.setattr(normalize, "_Unit", Noted)
    return found


def result_and_gradient(x: Tensor, function: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    result = (function or F.normalize)(x, **options)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    return result.detach(), torch.autograd.grad(result, x, weights)[0]


def inputs() -> Tensor:
    """Some vectors are zero, some shorter than any eps here, some just longer."""
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0
    x[0, :, 0, 1] *= 1e-14
    x[0, :, 0, 2] *= 1e-11
    return x


@pytest.mark.parametrize("options", [{}, {"dim": -1}, {"dim": 0, "eps": 1.5}, {"p": 2, "dim": 2, "eps": 1e-6}])
def test_it_is_what_float64_says(options: dict[str, Any], own: list[torch.dtype]) -> None:
    exact = result_and_gradient(inputs().double(), torchs, **options)
    with fast_functions(CPU):
        found = result_and_gradient(inputs(), **options)
    assert own == [torch.float32]
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_torch_and_bfloat16_is_as_near(
    dtype: torch.dtype, autocast: bool, own: list[torch.dtype]
) -> None:
    x = torch.randn(8, 64, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = result_and_gradient(x.double(), torchs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = result_and_gradient(x)
        with fast_functions(CPU):
            found = result_and_gradient(x)
    assert own == [dtype]
    for one, other, true in zip(found, wanted, exact, strict=True):
        assert one.dtype == other.dtype == dtype
        own_error, torchs_error = (float((each.double() - true).norm() / true.norm()) for each in (one, other))
        assert own_error < max(1.5 * torchs_error, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {"p": 1.0}),
        (torch.float32, {"dim": (1, 2)}),
        (torch.float32, {"eps": 1e-30}),
    ],
)
def test_the_rest_is_left_to_torch(dtype: torch.dtype, options: dict[str, Any], own: list[torch.dtype]) -> None:
    x = inputs().to(dtype)
    with fast_functions(CPU):
        found = F.normalize(x, **options)
    assert not own and torch.equal(found, torchs(x, **options))


def test_transforms_of_functions_are_left_to_torch(own: list[torch.dtype]) -> None:
    x = inputs()
    wanted = torch.func.grad(lambda x: torchs(x).square().mul(x).sum())(x)
    with fast_functions(CPU):
        found = torch.func.grad(lambda x: F.normalize(x).square().mul(x).sum())(x)
    assert not own and torch.equal(found, wanted)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with fast_functions(CPU):
        (first,) = torch.autograd.grad(F.normalize(x).square().mul(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_bad_input_gets_torchs_own_error() -> None:
    with fast_functions(CPU), pytest.raises(IndexError, match="out of range"):
        F.normalize(torch.ones(2, 3), dim=5)


def test_blocks_computed_again_find_the_same_gradients(own: list[torch.dtype]) -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(torch.sin(x), dim=1)

    x = inputs()
    with fast_functions(CPU):
        plain = result_and_gradient(x, Norm())
        again = result_and_gradient(x, lambda x: checkpoint(Norm(), x, use_reentrant=False))
    assert len(own) == 3
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    assert F.normalize is torchs
