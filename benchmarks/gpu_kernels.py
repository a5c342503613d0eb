"""Sections of `gpu_check.py` on kernels of our own: that they are right, that they are in use, and what they take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_lab import Lab, NotHere, Wrong
from torch import Tensor
from training import bandwidth

from diffkit.backbones.norm import GroupNorm, can_fuse
from diffkit.core import random
from diffkit.core.random import Purpose, normal
from diffkit.engine.devices import autocast

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
ROUNDING = {BFLOAT16: 2.0**-7, FLOAT32: 2e-5}
"""Of the largest value of a tensor of this type."""
NOISE_LIMIT = 1e-6
"""Of a number; of those below 1, of 1."""


def norms(lab: Lab) -> dict[str, Any]:
    """The fused GroupNorm beside float64; then its speed beside a copy's, and what a call takes of the host."""
    if not can_fuse(torch.zeros(1, 4, 1, 1, device=lab.device)):
        raise NotHere("The kernels are Triton's, for CUDA.")
    shapes = [(2, 24, 5, 7)] if lab.small else [(4, 192, 33, 31), (16, 256, 32, 32), (2, 22, 3, 3)]
    found: dict[str, dict[str, float]] = {}
    wrong = []
    for shape, dtype, last, modulated in itertools.product(shapes, ROUNDING, (False, True), (False, True)):
        name = f"{list(shape)}, {_case(dtype, last)}{', modulated' if modulated else ''}"
        errors = _errors(lab, shape, dtype, last, modulated)
        found[name] = {tensor: float(f"{far:.2g}") for tensor, (far, _) in errors.items()}
        wrong += [f"{tensor} of {name}" for tensor, (far, limit) in errors.items() if not far <= limit]
    if wrong:
        raise Wrong(f"The fused norms give others than float64: {', '.join(wrong)}.", **found)
    copy = bandwidth(lab.device)
    speeds = {_case(*each): _speed(lab, *each, copy) for each in itertools.product(ROUNDING, (False, True))}
    worst = {kind: max(each[kind] for each in found.values() if kind in each) for kind in ("y", "x", "weight", "bias")}
    return {
        "largest_errors": worst,
        "copy_gb_a_second": round(copy / 1e9, 1),
        "speeds": speeds,
        "host_microseconds": {name: _host(lab, fused) for name, fused in (("fused", True), ("torch's", False))},
    }


def _case(dtype: torch.dtype, last: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')}, channels {'last' if last else 'first'}"


def _layer(lab: Lab, channels: int, fused: bool = True) -> GroupNorm:
    """With weights that are all random."""
    layer = GroupNorm(channels, silu=True).to(lab.device)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.fused_kernel = fused
    return layer


def _images(lab: Lab, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return (0.5 + torch.randn(shape, device=lab.device)).to(dtype).contiguous(memory_format=layout).requires_grad_()


def _errors(
    lab: Lab, shape: tuple[int, ...], dtype: torch.dtype, last: bool, modulated: bool
) -> dict[str, tuple[float, float]]:
    """Of the result and of each gradient: the furthest from float64, as a share of the largest, and the limit."""
    torch.manual_seed(0)
    layer, x = _layer(lab, shape[1]), _images(lab, shape, dtype, last)
    given = {"x": x, "weight": layer.weight, "bias": layer.bias}
    if modulated:
        given["modulation"] = torch.randn(shape[0], 2 * shape[1], device=lab.device).to(dtype).requires_grad_()
    with autocast(lab.device, "bfloat16" if dtype == BFLOAT16 else "float32")():
        y = layer(x, given.get("modulation"))
    if "Fused" not in type(y.grad_fn).__name__ or y.dtype != dtype or y.stride() != x.stride():
        raise Wrong("The fused norms are not in use, or answer in another type or layout.", type=str(y.dtype))
    grad = torch.randn_like(y)
    found = {"y": y, **dict(zip(given, torch.autograd.grad(y, list(given.values()), grad), strict=True))}
    exact = {name: each.detach().double().requires_grad_() for name, each in given.items()}
    wanted_y = F.group_norm(exact["x"], layer.num_groups, exact["weight"], exact["bias"], layer.eps)
    if modulated:
        scale, shift = exact["modulation"][:, :, None, None].chunk(2, 1)
        wanted_y = wanted_y * (1 + scale) + shift
    wanted_y = F.silu(wanted_y)
    gradients = torch.autograd.grad(wanted_y, list(exact.values()), grad.double())
    wanted = {"y": wanted_y, **dict(zip(exact, gradients, strict=True))}
    return {
        name: (
            float((found[name].double() - each).abs().max() / each.abs().max().clamp(min=1e-12)),
            ROUNDING[found[name].dtype],
        )
        for name, each in wanted.items()
    }


def _speed(lab: Lab, dtype: torch.dtype, last: bool, copy: float) -> dict[str, dict[str, float]]:
    """Of 64 images of 128 channels at 128x128. Forward x is read twice and y written, backward x and y's gradient are
    read twice and x's written. `share_of_copy`: of the bytes a second of a large copy."""
    layer, x = _layer(lab, 128), _images(lab, (2, 128, 8, 8) if lab.small else (64, 128, 128, 128), dtype, last)
    x = x.detach()
    operations, rest = torch.ops.diffkit, (layer.num_groups, layer.eps, True, dtype)
    weight, bias, groups = layer.weight.detach(), layer.bias.detach(), layer.num_groups
    y, *kept = operations.group_norm(x, weight, bias, None, *rest)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (3, lambda: operations.group_norm(x, weight, bias, None, *rest)),
        "backward": (5, lambda: operations.group_norm_backward(y, x, weight, bias, None, *kept, groups, True)),
    }
    found = {}
    for name, (passes, work) in works.items():
        each = lab.milliseconds(work)
        speed = passes * x.numel() * x.element_size() / each * 1e3
        found[name] = {"ms": round(each, 3), "gb_a_second": round(speed / 1e9, 1), "share_of_copy": speed / copy}
        found[name]["share_of_copy"] = round(found[name]["share_of_copy"], 3)
    return found


def _host(lab: Lab, fused: bool) -> dict[str, float]:
    """Microseconds until a call on few small images is queued: forward, and forward and backward."""
    layer, x = _layer(lab, 64, fused), _images(lab, (2, 64, 4, 4), BFLOAT16, True)
    modulation = torch.randn(2, 128, device=lab.device, dtype=BFLOAT16).requires_grad_()

    def forward() -> Tensor:
        with autocast(lab.device, "bfloat16")():
            result: Tensor = layer(x, modulation)
        return result

    def both() -> None:
        y = forward()
        torch.autograd.grad(y, [x, layer.weight, layer.bias, modulation], y.detach())

    found = {}
    for name, work in {"forward": forward, "forward and backward": both}.items():
        rounds, count = (1, 2) if lab.small else (5, 50)
        times = []
        for _ in range(rounds + 1):
            lab.finish()
            start = time.perf_counter()
            for _ in range(count):
                work()
            times.append((time.perf_counter() - start) / count)
        found[name] = round(min(times[1:]) * 1e6, 1)
    return found


def noise(lab: Lab) -> dict[str, Any]:
    """The kernel for noise is in use, and its numbers are those of torch's operations here and on a CPU."""
    lab.need_cuda("kernel for noise")
    if random._kernel(lab.device) is None:
        raise Wrong("The kernel for noise is not in use: it cannot be launched here, or gives other numbers.")
    positions, shape = torch.arange(2**31 - 2, 2**31 + 6), (3, 33, 31) if lab.small else (3, 128, 128)
    there, count = positions.to(lab.device), shape[0] * shape[1] * shape[2]
    equal, far = [], {"torch's operations": 0.0, "a CPU": 0.0}
    for seed, interval in ((7, 0), (2**61 + 1, 5), (-3, positions % 7)):
        of_each = interval.to(lab.device) if isinstance(interval, Tensor) else interval
        found = normal(seed, Purpose.START_NOISE, there, shape, of_each)
        plain = random._transformed(seed, Purpose.START_NOISE, there, count, of_each).reshape(found.shape)
        equal.append(float((found == plain).double().mean()))
        on_cpu = normal(seed, Purpose.START_NOISE, positions, shape, interval)
        for name, other in (("torch's operations", plain.cpu()), ("a CPU", on_cpu)):
            apart = (found.cpu().double() - other.double()).abs() / other.double().abs().clamp(min=1)
            far[name] = max(far[name], float(apart.max()))
    if max(far.values()) > NOISE_LIMIT:
        raise Wrong("The noise of the kernel is other than that of torch's operations or of a CPU.", **far)
    some = torch.arange(2 if lab.small else 64, device=lab.device)
    each = lab.milliseconds(lambda: normal(7, Purpose.TRAIN_NOISE, some, shape))
    plainly = lab.milliseconds(lambda: random._transformed(7, Purpose.TRAIN_NOISE, some, count, 0))
    return {
        "share_of_equal_bits_to_torch's": min(equal),
        "largest_difference": far,
        "images": [len(some), *shape],
        "ms": {"kernel": round(each, 3), "torch's operations": round(plainly, 3)},
        "kernel_gb_a_second": round(4 * len(some) * count / each / 1e6, 1),
    }


SECTIONS = (norms, noise)
