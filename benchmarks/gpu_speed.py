"""Sections of `gpu_check.py` that say how fast a device computes, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_lab import Lab, Trainee, Wrong
from training import bandwidth, peak

from diffkit.backbones.unet import repeated
from diffkit.core.random import Purpose, normal
from diffkit.engine.devices import autocast
from diffkit.engine.gradients import MOST_POSITIONS, STEPS_TRIED
from diffkit.engine.optimizer import clip_gradients
from diffkit.engine.speed import LAYOUTS, ON_A_GPU, Way

LARGEST = MOST_POSITIONS // 128**2
"""Images at 128x128, above which no CUDA graph is tried."""

KINDS = {
    "convolution, matmul": ("conv", "gemm", "xmma", "wgrad", "dgrad", "fprop", "cutlass", "nvjet", "mm", "mkldnn"),
    "attention": ("fmha", "flash", "attention"),
    "compiled": ("triton",),
    "norm": ("norm",),
    "update": ("multi_tensor", "fused_adam", "foreach"),
    "copies and casts": ("memcpy", "memset", "copy", "to_copy"),
}
"""Of kernels and operations, by words in their names; the first that fits."""


def _flops(trainee: Trainee) -> float:
    """Of an image's forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    spec, network = trainee.spec, trainee.network
    x = torch.zeros(1, spec.channels, spec.height, spec.width, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x, x.new_zeros(1))
    return 3.0 * counter.get_total_flops()


def limits(lab: Lab) -> dict[str, Any]:
    """What the device can do at best: a large product of matrices in bfloat16, and a large copy."""
    return {
        "bfloat16_tflops": round(peak(lab.device, "bfloat16") / 1e12, 2),
        "copy_gb_a_second": round(bandwidth(lab.device) / 1e9, 1),
    }


def pieces(lab: Lab) -> dict[str, Any]:
    """Milliseconds of the parts of a step of the base network beside one another, in bfloat16, batch 64 at 128x128."""
    trainee = lab.trainee(128, "base", 64, way=Way(channels_last=True))
    network, batch = trainee.run_as, trainee.batch
    positions = torch.arange(batch, device=lab.device)
    x = torch.randn(batch, 3, trainee.spec.height, trainee.spec.width, device=lab.device)
    level = torch.zeros(batch, device=lab.device)

    def forward() -> torch.Tensor:
        with autocast(lab.device, "bfloat16")():
            answer: torch.Tensor = network.train()(x, level)
        return answer

    def both() -> None:
        forward().float().square().mean().backward()

    found = {
        "noise": lab.milliseconds(lambda: normal(0, Purpose.TRAIN_NOISE, positions, x.shape[1:])),
        "forward": lab.milliseconds(forward, 2, 5),
        "forward and backward": lab.milliseconds(both, 2, 5),
    }
    trainee.take(1)
    parameters = list(trainee.network.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    found["clip"] = lab.milliseconds(lambda: clip_gradients(parameters, 1.0))
    found["update"] = lab.milliseconds(lambda: trainee.state.optimizer.step(1e-4))
    return {**{name: round(value, 3) for name, value in found.items()}, "doubled in bfloat16": _doubling(lab)}


def _doubling(lab: Lab) -> dict[str, float]:
    """Milliseconds, forward and backward, of 64 images of 256 channels from 64x64 to 128x128: the one that is used on
    CUDA, and torch's. Raises Wrong where one is another than the other."""
    shape = (2, 8, 4, 4) if lab.small else (64, 256, 64, 64)
    x = torch.randn(shape, device=lab.device).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    ways = {"repeated": repeated, "F.interpolate": partial(F.interpolate, scale_factor=2.0, mode="nearest")}
    made = {name: double(x) for name, double in ways.items()}
    y, wanted = made.values()
    grad = torch.randn_like(y)
    gradients = [torch.autograd.grad(each, x, grad)[0].float() for each in (y, wanted)]
    if not torch.equal(y, wanted) or not torch.allclose(*gradients, rtol=2**-6, atol=2**-6):
        raise Wrong("Images are doubled otherwise than by torch.")

    def both(double: Callable[[torch.Tensor], torch.Tensor]) -> None:
        torch.autograd.grad(double(x), x, grad)

    return {name: round(lab.milliseconds(partial(both, double)), 3) for name, double in ways.items()}


def profile(lab: Lab) -> dict[str, Any]:
    """Where a step's time goes, by kind of kernel and by kernel, in the fastest way that is expected."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    way = Way(True, True) if lab.cuda else Way()
    trainee = lab.trainee(128, "base", 64, way=way)
    running = trainee.steps()
    for _ in range(5 if lab.cuda else 1):
        next(running)
    lab.finish()
    steps = 3 if lab.cuda else 1
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if lab.cuda else [])]
    with recording(activities=activities, acc_events=True) as found:
        for _ in range(steps):
            next(running)
        lab.finish()
    rows = []
    for event in found.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
        seconds = event.self_device_time_total if lab.cuda else event.self_cpu_time_total
        if seconds and on_device == lab.cuda:
            rows.append((seconds / steps / 1e3, event.count / steps, event.key))
    rows.sort(reverse=True)
    kinds: dict[str, list[float]] = {}
    for milliseconds, count, name in rows:
        row = kinds.setdefault(_kind(name), [0.0, 0.0])
        row[0] += milliseconds
        row[1] += count
    total = sum(row[0] for row in rows)
    return {
        "way": str(way),
        "busy_ms": round(total, 2),
        "kinds": {name: {"ms": round(ms, 3), "count": round(count, 1)} for name, (ms, count) in kinds.items()},
        "slowest": [{"ms": round(ms, 3), "count": round(n, 1), "name": name[:160]} for ms, n, name in rows[:30]],
    }


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "rest")


def ways(lab: Lab) -> dict[str, Any]:
    """A step in each layout, compiled or not, with and without cuDNN's own trial of its kernels.

    Then twice as many images, about the most that a CUDA graph is tried for: without one, and as one if it is faster.
    """
    best_tflops, figures = peak(lab.device, "bfloat16") / 1e12, dict[str, Any]()
    cases: list[tuple[Way, bool, dict[str, Any]]] = [
        (way, False, {}) for way in (ON_A_GPU if lab.cuda else ON_A_GPU[:2])
    ]
    if lab.cuda:
        cases += [(way, True, {}) for way in ON_A_GPU if way.channels_last]
        cases += [(LAYOUTS[-1], True, {"batch": LARGEST, "graphs": graphs}) for graphs in (False, True)]
    before = torch.backends.cudnn.benchmark
    try:
        for way, benchmark, how in cases:
            torch.backends.cudnn.benchmark = benchmark
            name = ", ".join(
                [str(way), *(["cudnn.benchmark"] if benchmark else []), *(f"{k} {v}" for k, v in how.items())]
            )
            try:
                figures[name] = _step(lab, way, best_tflops, **how)
            except Exception as error:
                figures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print("  ", name, figures[name], flush=True)
    finally:
        torch.backends.cudnn.benchmark = before
    failed = [name for name, found in figures.items() if isinstance(found, str)]
    if failed:
        raise Wrong(f"Steps fail: {', '.join(failed)}.", **figures)
    return figures


def _step(lab: Lab, way: Way, best_tflops: float, batch: int = 64, graphs: bool = False) -> dict[str, Any]:
    """Milliseconds of a step of the base network at 128x128, and what follows from them; what is remarked of a graph.

    `peak_gib`: of tensors; `reserved_gib`: what torch holds at the end, a graph's own memory included.
    """
    lab.free()
    trainee = lab.trainee(128, "base", batch, way=way, graphs=graphs)
    start, running = time.perf_counter(), trainee.steps()
    next(running)
    lab.finish()
    first = time.perf_counter() - start
    each = lab.milliseconds(lambda: next(running), STEPS_TRIED if graphs else 4, 12)
    tflops = trainee.batch * _flops(trainee) / each / 1e9
    found = {
        "step_ms": round(each, 2),
        "images_per_second": round(trainee.batch / each * 1e3, 1),
        "tflops": round(tflops, 2),
        "mfu": round(tflops / best_tflops, 4),
        "first_step_seconds": round(first, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated(lab.device) / 2**30, 2) if lab.cuda else 0.0,
        "reserved_gib": round(torch.cuda.memory_reserved(lab.device) / 2**30, 2) if lab.cuda else 0.0,
    }
    return {**found, "remarks": trainee.remarks} if graphs else found


SECTIONS = (limits, pieces, profile, ways)
