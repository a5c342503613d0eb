"""Sections of `gpu_check.py` that say how fast a device computes, and where the time goes."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_lab import Lab, Trainee
from training import bandwidth, peak

from diffkit.core.random import Purpose, normal
from diffkit.engine.devices import autocast
from diffkit.engine.speed import ON_A_GPU, Way

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
    network, batch = trainee.network, trainee.batch
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
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    found["clip"] = lab.milliseconds(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    found["update"] = lab.milliseconds(lambda: trainee.state.optimizer.step(1e-4))
    return {name: round(value, 3) for name, value in found.items()}


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
    """A step in each layout, compiled or not, with and without cuDNN's own trial of its kernels."""
    best_tflops, figures = peak(lab.device, "bfloat16") / 1e12, dict[str, Any]()
    cases = [(way, False) for way in (ON_A_GPU if lab.cuda else ON_A_GPU[:2])]
    cases += [(way, True) for way in ON_A_GPU if way.channels_last] if lab.cuda else []
    before = torch.backends.cudnn.benchmark
    try:
        for way, benchmark in cases:
            torch.backends.cudnn.benchmark = benchmark
            name = f"{way}{', cudnn.benchmark' if benchmark else ''}"
            lab.free()
            try:
                figures[name] = _step(lab, way, best_tflops)
            except Exception as error:
                figures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print("  ", name, figures[name], flush=True)
    finally:
        torch.backends.cudnn.benchmark = before
    return figures


def _step(lab: Lab, way: Way, best_tflops: float) -> dict[str, float]:
    """Milliseconds of a step of the base network, batch 64 at 128x128, and what follows from them."""
    trainee = lab.trainee(128, "base", 64, way=way)
    batch, start, running = trainee.batch, time.perf_counter(), trainee.steps()
    next(running)
    lab.finish()
    first = time.perf_counter() - start
    each = lab.milliseconds(lambda: next(running), 4, 12)
    tflops = batch * _flops(trainee) / each / 1e9
    memory = torch.cuda.max_memory_allocated(lab.device) / 2**30 if lab.cuda else 0.0
    return {
        "step_ms": round(each, 2),
        "images_per_second": round(batch / each * 1e3, 1),
        "tflops": round(tflops, 2),
        "mfu": round(tflops / best_tflops, 4),
        "first_step_seconds": round(first, 1),
        "peak_gib": round(memory, 2),
    }


SECTIONS = (limits, pieces, profile, ways)
