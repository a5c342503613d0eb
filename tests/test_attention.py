"""Attention in pieces, on a CPU in bfloat16: near to the exact one, also where blocks are computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import call_diffkit
from diffkit.backbones.unet import unet
from diffkit.engine import attention
from diffkit.engine.functions import fast_functions
from diffkit.interfaces import ImageSpec

CPU = torch.device("cpu")


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is computed in pieces."""
    shapes: list[tuple[int, ...]] = []
    pieces = attention._pieces
    monkeypatch.setattr(attention, "_pieces", lambda q, k: (shapes.append(tuple(q.shape)), pieces(q, k))[1])
    return shapes


def result_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    inputs = [each.detach().requires_grad_() for each in inputs]
    result = attend(*inputs, **options)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    return [result.detach(), *torch.autograd.grad(result, inputs, weights)]


def far(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("piece", [2**19, 2**13, 1])
@pytest.mark.parametrize(
    ("q", "k", "v", "options"),
    [
        ((2, 3, 64, 16), (2, 3, 64, 16), (2, 3, 64, 16), {}),
        ((5, 64, 8), (5, 256, 8), (5, 256, 24), {}),  # three dimensions; of other positions, to other channels
        ((4, 1, 96, 64), (4, 1, 96, 64), (4, 1, 96, 64), {"scale": 0.3, "dropout_p": 0.0, "attn_mask": None}),
    ],
)
def test_it_is_near_to_the_exact_attention(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    options: dict[str, Any],
    piece: int,
    in_pieces: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(attention, "SMALLEST", 2**13)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in (q, k, v)]
    exact = result_and_gradients(F.scaled_dot_product_attention, [each.double() for each in inputs], **options)
    with fast_functions(CPU):
        found = result_and_gradients(F.scaled_dot_product_attention, inputs, **options)
    assert len(in_pieces) == 2  # forward and backward
    assert [each.shape for each in found] == [each.shape for each in exact]
    assert all(each.dtype == torch.bfloat16 for each in found)
    assert max(far(found, exact)) < 0.01  # 2 ** -8 is what one rounding may cost


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"is_causal": True}),
        (torch.bfloat16, {"attn_mask": torch.eye(64, dtype=torch.bool)}),
    ],
)
def test_what_does_not_fit_is_left_to_torch(
    dtype: torch.dtype, options: dict[str, Any], in_pieces: list[tuple[int, ...]]
) -> None:
    inputs = [torch.randn(4, 4, 64, 16).to(dtype) for _ in range(3)]
    plain = result_and_gradients(F.scaled_dot_product_attention, inputs, **options)
    with fast_functions(CPU):
        found = result_and_gradients(F.scaled_dot_product_attention, inputs, **options)
    assert not in_pieces
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_what_autocast_would_not_have_in_bfloat16_is_left_to_torch(
    dtype: torch.dtype, autocast: torch.dtype, in_pieces: list[tuple[int, ...]]
) -> None:
    inputs = [torch.randn(4, 4, 64, 16).to(dtype) for _ in range(3)]
    with torch.autocast("cpu", autocast):
        plain = F.scaled_dot_product_attention(*inputs)
        with fast_functions(CPU):
            found = F.scaled_dot_product_attention(*inputs)
    assert not in_pieces and found.dtype == plain.dtype and torch.equal(found, plain)


@pytest.mark.parametrize("amx", [False, True])
def test_many_positions_are_left_to_torch_where_it_has_amx(
    amx: bool, in_pieces: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    few, many = (torch.randn(2, positions, 8).bfloat16() for positions in (512, 600))
    with fast_functions(CPU):
        F.scaled_dot_product_attention(few, few, few)
        F.scaled_dot_product_attention(many, many, many)
    assert [shape[1] for shape in in_pieces] == ([512] if amx else [512, 600])


def test_types_that_do_not_go_together_are_torchs_error(in_pieces: list[tuple[int, ...]]) -> None:
    q, k, v = (torch.randn(4, 4, 64, 16) for _ in range(3))
    with fast_functions(CPU), pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(q.bfloat16(), k, v)
    with fast_functions(CPU), torch.autocast("cpu", torch.bfloat16):  # which makes them go together
        assert F.scaled_dot_product_attention(q.bfloat16(), k, v).dtype == torch.bfloat16
    assert in_pieces


def gradients(network: nn.Module) -> list[Tensor]:
    network.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(8, 3, 16, 16, generator=generator), torch.linspace(-1, 1, 8)
    with fast_functions(CPU):
        with torch.autocast("cpu", torch.bfloat16):
            result = network(x, c_noise)
        result.square().mean().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def networks(**options: int) -> list[nn.Module]:
    """Two with the same weights, of which none is zero; the first with these options."""
    both = [unet(ImageSpec(3, 16, 16), width=32, multipliers=(1, 2), blocks=1, **each) for each in (options, {})]
    generator = torch.Generator().manual_seed(0)
    for parameter in both[0].parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 20
    both[1].load_state_dict(both[0].state_dict())
    return both


def test_blocks_that_are_computed_again_have_it_again(in_pieces: list[tuple[int, ...]]) -> None:
    again, kept = networks(checkpoint=2)
    found, times = gradients(again), len(in_pieces)
    plain = gradients(kept)
    assert times > len(in_pieces) - times > 0
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


def test_torchs_own_is_put_back_also_after_an_error() -> None:
    own = F.scaled_dot_product_attention
    with pytest.raises(ValueError, match="this"), fast_functions(CPU):
        assert F.scaled_dot_product_attention is not own
        raise ValueError("this")
    assert F.scaled_dot_product_attention is own


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_training_has_it_in_bfloat16(
    precision: str, dataset: Path, tmp_path: Path, in_pieces: list[tuple[int, ...]]
) -> None:
    backbone = "unet:width=8,multipliers=[1,2],blocks=1,patch=1,attention=12,checkpoint=1"
    options = ("--backbone", backbone, "--batch-size", 8, "--steps", 2, "--device", "cpu", "--precision", precision)
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    assert set(in_pieces) == ({(8, 144, 8)} if precision == "bfloat16" else set())


def test_threads_that_leave_in_any_order_leave_torchs_own_functions() -> None:
    own, device = F.scaled_dot_product_attention, torch.device("cpu")
    one, other = fast_functions(device), fast_functions(device)
    with one:
        other.__enter__()
    assert F.scaled_dot_product_attention is not own  # the other still computes
    other.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is own
