"""The kernels of GroupNorm in Triton's interpreter, beside float64. Run by test_norm.py, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.backbones import norm, norm_launch
from diffkit.backbones.norm import GroupNorm
from diffkit.backbones.unet import Block, unet
from diffkit.interfaces import ImageSpec

BF16, F32 = torch.bfloat16, torch.float32


def layer(channels: int, silu: bool) -> GroupNorm:
    torch.manual_seed(0)
    made = GroupNorm(channels, silu=silu)
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    made.fused_kernel = True
    return made


def images(*shape: int, dtype: torch.dtype, last: bool, mean: float = 0.5) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return (mean + torch.randn(shape)).to(dtype).contiguous(memory_format=layout).requires_grad_()


def reference(made: GroupNorm, x: Tensor, modulation: Tensor | None) -> Tensor:
    """Of the definition, in float64; mean and variance over the group's channels and all positions."""
    groups = x.unflatten(1, (made.num_groups, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    y = ((groups - mean) / (variance + made.eps).sqrt()).flatten(1, 2)
    y = y * made.weight[:, None, None] + made.bias[:, None, None]
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, 1)
        y = y * (1 + scale) + shift
    return y * torch.sigmoid(y) if made.silu else y


def compare(made: GroupNorm, x: Tensor, modulation: Tensor | None, rounding: float) -> None:
    """Results and gradients, within `rounding` of the largest (the interpreter cuts digits off for bfloat16)."""
    y = made(x, modulation)
    assert y.dtype == made.weight.dtype and y.stride() == x.stride() and y.grad_fn.name() == "_FusedBackward"
    grad = torch.randn_like(y)
    given = [x, made.weight, made.bias] + ([] if modulation is None else [modulation])
    found = torch.autograd.grad(y, given, grad)
    exact = GroupNorm(x.shape[1], silu=made.silu).double()
    exact.load_state_dict(made.state_dict())
    doubles = [x.detach().double().requires_grad_(), exact.weight, exact.bias]
    doubles += [] if modulation is None else [modulation.detach().double().requires_grad_()]
    wanted_y = reference(exact, doubles[0], None if modulation is None else doubles[3])
    wanted = torch.autograd.grad(wanted_y, doubles, grad.double())
    for own, other, like in zip([y, *found], [wanted_y, *wanted], [y, *given], strict=True):
        assert own.dtype == like.dtype and own.shape == like.shape
        limit = 2**-7 if own.dtype == BF16 else rounding
        assert float((own.double() - other).detach().abs().max()) <= limit * float(other.detach().abs().max())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "silu", "modulated"),
    [
        ((2, 12, 5, 7), F32, True, True),
        ((1, 22, 3, 3), F32, False, False),  # two groups of 11
        ((1, 72, 9, 8), BF16, True, True),  # more than one tile either way
        ((2, 4, 1, 1), F32, True, False),
    ],
)
def test_results_and_gradients(shape: Any, dtype: torch.dtype, silu: bool, modulated: bool, last: bool) -> None:
    made = layer(shape[1], silu)
    x = images(*shape, dtype=dtype, last=last)
    modulation = torch.randn(shape[0], 2 * shape[1]).to(dtype).requires_grad_() if modulated else None
    compare(made, x, modulation, 5e-6)


@pytest.mark.parametrize("last", [False, True])
def test_many_tiles_are_merged_in_several_rounds(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    monkeypatch.setattr(norm_launch, "TILE", 32)
    monkeypatch.setattr(norm_launch, "MOST_POSITIONS", 8)
    monkeypatch.setattr(norm_launch, "FEWEST_CHANNELS", 4)
    monkeypatch.setattr(norm_launch, "PARTS", 8)
    compare(layer(8, True), images(1, 8, 7, 6, dtype=F32, last=last), torch.randn(1, 16).requires_grad_(), 5e-6)


def test_a_mean_far_from_zero_costs_no_digits_of_the_deviation() -> None:
    """The difference of the mean square and the squared mean would have none left."""
    made, x = layer(8, False), images(1, 8, 16, 16, dtype=F32, last=True, mean=3000.0)
    _, statistics, _ = torch.ops.diffkit.group_norm(x, made.weight, made.bias, None, 2, 1e-5, False, F32)
    exact = x.detach().double().unflatten(1, (2, 4))
    torch.testing.assert_close(statistics[0].double(), exact.mean((2, 3, 4)), rtol=1e-6, atol=0)
    wanted = (exact.var((2, 3, 4), correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(statistics[1].double(), wanted, rtol=1e-4, atol=0)


def test_shapes_and_types_are_announced_as_they_come() -> None:
    x, made = images(2, 8, 3, 5, dtype=BF16, last=True).detach(), layer(8, True)
    modulation = torch.randn(2, 16)
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.diffkit.group_norm.default, torch.ops.diffkit.group_norm_backward.default
    weight, bias = made.weight.detach(), made.bias.detach()
    for given in (modulation, None):
        inputs = (x, weight, bias, given, 2, 1e-5, True, F32)
        torch.library.opcheck(forward, inputs, test_utils=checks)
        y, statistics, factors = forward(*inputs)
        inputs = (y, x, weight, bias, given, statistics, factors, 2, True)
        torch.library.opcheck(backward, inputs, test_utils=checks)


def test_gradients_of_gradients_and_function_transforms_are_torchs() -> None:
    made, x = layer(8, True), images(1, 8, 3, 3, dtype=F32, last=False)
    modulation = torch.randn(1, 16).requires_grad_()
    second = []
    for fused in (True, False):
        made.fused_kernel = fused
        (grad,) = torch.autograd.grad(made(x, modulation).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), [x, made.weight, modulation]))
    for own, other in zip(*second, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    made.fused_kernel = True
    found = torch.func.grad(lambda value: made(value, modulation).square().sum())(x.detach())
    (wanted,) = torch.autograd.grad(made(x, modulation).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def network() -> nn.Module:
    torch.manual_seed(0)
    made = unet(ImageSpec(3, 8, 8), width=8, multipliers=(1, 2), blocks=1, attention=4, resample="plain", skips="add")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_a_network_with_the_kernels_computes_the_same() -> None:
    made, x = network(), torch.randn(1, 3, 8, 8)
    found = []
    for fused in (False, True):
        for each in made.modules():
            if isinstance(each, GroupNorm):
                each.fused_kernel = fused
        y = made(x, torch.zeros(1))
        found.append([y, *torch.autograd.grad(y.square().mean(), [*made.parameters()])])
    for own, other in zip(*found, strict=True):
        assert float((own - other).detach().norm()) < 1e-5 * float(other.detach().norm())


def test_results_are_of_autocasts_type_and_without_it_of_the_weights() -> None:
    made, x = layer(8, True), images(1, 8, 2, 2, dtype=BF16, last=False)
    assert made(x).dtype == F32
    with torch.autocast("cpu", dtype=BF16):
        assert made(x).dtype == made(x.float()).dtype == BF16


def test_a_block_with_the_kernels_is_one_graph() -> None:
    block, x, embedding = Block(8, 16, 8, 0.0, False, 0, "add"), torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    nn.init.normal_(block.conv2.weight)
    for each in (block.norm1, block.norm2):
        each.fused_kernel = True
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    wanted, found = block(x, embedding), compiled(x, embedding)
    assert norm.INTERPRETED and torch.equal(wanted, found)
    for own, other in zip(
        torch.autograd.grad(found.sum(), [*block.parameters()]),
        torch.autograd.grad(wanted.sum(), [*block.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(own, other)
