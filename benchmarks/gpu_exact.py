"""Sections of `gpu_check.py` that say whether a device computes what it should."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_lab import CPU, PREDICTION, Lab, Wrong, furthest
from torch import Tensor

from diffkit.builtin import samplers as builtin_samplers
from diffkit.core.denoiser import Denoiser
from diffkit.core.random import Purpose, bits, normal
from diffkit.core.schedules import karras, over_range, sampling_grid
from diffkit.engine.casts import CastTogether
from diffkit.engine.checkpoint import Checkpoint
from diffkit.engine.devices import autocast
from diffkit.engine.sample import Plan, sample
from diffkit.engine.saver import Saver
from diffkit.engine.speed import Way

FLOAT32_LIMIT, BFLOAT16_LIMIT, STATE_LIMIT = 1e-3, 0.1, 0.02
GRAPH_LIMIT = 0.02
RECORDABLE = ("plain", "float32", "channels last", "fused norms")
SAMPLE_LIMIT = 2  # of 255


def env(lab: Lab) -> dict[str, Any]:
    """What the machine has."""
    packages = ("torch", "triton", "numpy", "torchvision", "diffusers", "accelerate", "pydantic", "typer", "rich")
    found: dict[str, Any] = {"python": sys.version.split()[0], "compiler": shutil.which("gcc") or shutil.which("clang")}
    found["python_headers"] = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    found["packages"] = {name: _version(name) for name in packages}
    if lab.cuda:
        properties = torch.cuda.get_device_properties(lab.device)
        free, total = torch.cuda.mem_get_info(lab.device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": [round(free / 2**30, 1), round(total / 2**30, 1)],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def philox(lab: Lab) -> dict[str, Any]:
    """Random bits are the same as on a CPU, normal numbers but for rounding."""
    positions = torch.arange(2**31 - 2, 2**31 + 6)
    there = positions.to(lab.device)
    if not torch.equal(bits(7, Purpose.TRAIN_NOISE, positions, 999), bits(7, Purpose.TRAIN_NOISE, there, 999).cpu()):
        raise Wrong("The random bits are others than on a CPU.")
    shape = (3, 32, 32)
    own, other = normal(7, Purpose.TRAIN_NOISE, positions, shape), normal(7, Purpose.TRAIN_NOISE, there, shape).cpu()
    far = float((own - other).abs().max())
    figures = {"largest_difference": far, "equal": far == 0}
    if far > 1e-5:
        raise Wrong("The normal numbers are others than on a CPU.", **figures)
    return figures


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def training(lab: Lab) -> dict[str, Any]:
    """Gradients and weights are those of a CPU in float32: in float32, and the former roughly in bfloat16."""
    gradients, ends, together = [], [], 0
    with _without_tf32():
        for device, precision in ((CPU, "float32"), (lab.device, "float32"), (lab.device, "bfloat16")):
            trainee = lab.trainee(batch=4, device=device, precision=precision)
            gradients.append(trainee.first_gradient())
            trainee.take(2)
            ends.append(trainee.tensors())
            together = _cast_together(trainee.run_as)
    full, half = (float((each - gradients[0]).norm() / gradients[0].norm()) for each in gradients[1:])
    far, name = furthest(ends[0], ends[1])
    figures = {"gradient_float32": full, "gradient_bfloat16": half, "after_3_steps_float32": far, "furthest": name}
    if lab.cuda:
        figures["weights_cast_together"] = together
        if not together:
            raise Wrong("Weights are not cast together: finding them or a pass with them has failed.", **figures)
    if full > FLOAT32_LIMIT or half > BFLOAT16_LIMIT or far > STATE_LIMIT:
        raise Wrong("Gradients or weights are others than on a CPU.", **figures)
    return figures


def _cast_together(network: torch.nn.Module) -> int:
    """How many weights are."""
    return len(network._places or ()) if isinstance(network, CastTogether) else 0


def sampling(lab: Lab) -> dict[str, Any]:
    """Each sampler makes the images that it makes on a CPU, in float32."""
    from importlib import import_module

    found: dict[str, int] = {}
    with _without_tf32():
        trainees = [lab.trainee(batch=4, device=device) for device in (CPU, lab.device)]
        for name, where in builtin_samplers().items():
            module, function = where.split(":")
            grid = sampling_grid(over_range(karras, 0.002, 80.0), 6)
            plan = Plan(getattr(import_module(module), function), grid, (0.0, 0.0, 0.0))
            made = []
            for trainee in trainees:
                denoiser = Denoiser(trainee.network.eval(), PREDICTION)
                (images,) = sample(denoiser, trainee.spec, plan, range(4))
                made.append(images.pixels.astype(int))
            found[name] = int(abs(made[0] - made[1]).max())
    if max(found.values()) > SAMPLE_LIMIT:
        raise Wrong("A sampler makes other images than on a CPU.", largest_difference=found)
    return {"largest_difference": found}


def graphs(lab: Lab) -> dict[str, Any]:
    """Thirty steps as CUDA graphs end where they end without; and what became of the graph, in words."""
    lab.need_cuda("CUDA graphs")
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "dropout": {"dropout": 0.2},
        "checkpoint": {"checkpoint": 1},
        "checkpoint and dropout": {"checkpoint": 1, "dropout": 0.2},
        "float32": {"precision": "float32"},
        "channels last": {"way": Way(True, False)},
        "fused norms": {"way": Way(True, False, True)},
        "compiled": {"way": Way(True, True)},
    }
    figures, wrong = dict[str, Any](), list[str]()
    for name, how in variants.items():
        ends = []
        try:
            for on in (False, True):
                trainee = lab.trainee(graphs=on, **how)
                trainee.take(30)
                lab.finish()
                ends.append(trainee.tensors())
        except Exception as error:
            figures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            wrong.append(f"{name} fails")
            continue
        far = furthest(ends[0], ends[1])[0]
        figures[name] = {"furthest": far, "remarks": trainee.remarks}
        wrong += [f"{name} ends elsewhere"] if far > GRAPH_LIMIT else []
        wrong += [f"{name} is not recorded"] if name in RECORDABLE and not trainee.recorded else []
    if wrong:
        raise Wrong(f"With a graph, {', '.join(wrong)}.", **figures)
    return figures


def syncs(lab: Lab) -> dict[str, Any]:
    """No step waits for the device."""
    lab.need_cuda("queue that could be waited for")
    running = lab.trainee(64).steps()
    for _ in range(5):
        next(running)
    lab.finish()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                next(running)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = sorted(
        {f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)}
    )
    torch.cuda._sleep(int(2e9))
    start = time.perf_counter()
    for _ in range(3):
        next(running)
    ahead = time.perf_counter() - start
    lab.finish()
    figures = {"synchronizing": found, "seconds_to_queue_three_steps": round(ahead, 4)}
    if found or ahead > 0.5:
        raise Wrong("A step waits for the device.", **figures)
    return figures


def saver(lab: Lab) -> dict[str, Any]:
    """What is written beside a training is the state as it was, in full and in part."""
    keeper = Saver()
    trainee = lab.trainee(batch=32, graphs=True)
    running = trainee.steps(before_update=keeper.copied)
    for _ in range(12 if lab.cuda else 2):
        next(running)
    keeper.reserve(trainee.state.checkpoint())
    wrong, rounds = set[str](), 2 if lab.small else 10
    for number in range(rounds):
        now = trainee.state.checkpoint()
        if number % 2:  # as a model is kept
            part = {name: value for name, value in now.tensors.items() if name.startswith("average.")}
            now = Checkpoint(part, now.images_seen, now.trained & part.keys())
        truth = {name: value.detach().cpu().clone() for name, value in now.tensors.items()}
        got: list[dict[str, Tensor]] = []
        begin = keeper.keep if number % 2 else keeper.begin
        writing = begin(now, lambda copy, got=got: got.append({n: t.clone() for n, t in copy.tensors.items()}))  # type: ignore[misc]
        for _ in range(3):
            next(running)
        writing.result()
        wrong |= {name for name in truth if not torch.equal(truth[name], got[0][name])}
    if wrong:
        raise Wrong("Tensors were saved otherwise than they were.", tensors=sorted(wrong)[:10])
    return {"saves": rounds, "tensors": len(truth)}


def resume(lab: Lab) -> dict[str, Any]:
    """A training that goes on from a checkpoint ends as one that never stopped: to the bit, where kernels allow it."""
    before = torch.backends.cudnn.deterministic
    figures: dict[str, Any] = {}
    try:
        for name, deterministic in (("deterministic kernels", True), ("any kernels", False)):
            torch.backends.cudnn.deterministic = deterministic
            whole, first, second = (lab.trainee() for _ in range(3))
            whole.take(6)
            first.take(3)
            halfway = Checkpoint(first.tensors(), first.state.images_seen)
            second.state.restore(halfway)
            second.take(3)
            ends = whole.tensors(), second.tensors()
            equal = all(torch.equal(ends[0][each], ends[1][each]) for each in ends[0])
            figures[name] = "equal" if equal else furthest(*ends)[0]
    finally:
        torch.backends.cudnn.deterministic = before
    if figures["deterministic kernels"] != "equal":
        raise Wrong("A training that goes on ends elsewhere.", **figures)
    return figures


def oom(lab: Lab) -> dict[str, Any]:
    """A batch beyond the memory is trained on in pieces."""
    from diffkit.engine.train import Reduced

    lab.need_cuda("memory of its own")
    lab.free()
    total = torch.cuda.mem_get_info(lab.device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 12 * 2**30 / total), lab.device)
    try:
        trainee = lab.trainee(128, "base", 256)
        events = list(trainee.events(until_images=256 * 2))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, lab.device)
        lab.free()
    pieces = [event.micro_batch for event in events if isinstance(event, Reduced)]
    figures = {"reduced_to": pieces, "steps": len(events) - len(pieces), "seen": trainee.state.images_seen}
    if not pieces or trainee.state.images_seen != 512:
        raise Wrong("The training did not go on in pieces.", **figures)
    return figures


def ready(lab: Lab) -> dict[str, Any]:
    """The network as `diffkit sample` runs it makes the images of the plain one; and how fast."""
    from diffkit.compose.machine import for_sampling
    from diffkit.core.samplers.multistep import deis

    figures: dict[str, Any] = {}
    grid = sampling_grid(over_range(karras, 0.002, 80.0), 15)
    plan = Plan(deis, grid, (0.0, 0.0, 0.0))
    for size, preset in ((32, "small"), (128, "base")):
        trainee = lab.trainee(size, preset)
        plain = trainee.network.eval().requires_grad_(False)
        copy = lab.trainee(size, preset).network.eval().requires_grad_(False)
        prepared = for_sampling(copy, trainee.spec, lab.device, "bfloat16")
        for batch in (1, 2) if lab.small else (1, 8, 64, 256):
            made, speeds = [], []
            for network in (plain, prepared):
                denoiser = Denoiser(network, PREDICTION, autocast(lab.device, "bfloat16"))
                draw = partial(sample, denoiser, trainee.spec, plan, range(batch), batch_size=batch)
                (images,) = draw()
                made.append(images.pixels.astype(int))
                speeds.append(round(batch / lab.milliseconds(lambda draw=draw: list(draw()), 0, 1) * 1e3, 2))  # type: ignore[misc]
            far = abs(made[0] - made[1])
            figures[f"{preset} at {trainee.spec.height}, batch {batch}"] = {
                "images_per_second": dict(zip(("plain", "ready"), speeds, strict=True)),
                "difference": {"mean": round(float(far.mean()), 3), "largest": int(far.max())},
            }
    worst = max(each["difference"]["mean"] for each in figures.values())
    if worst > SAMPLE_LIMIT:
        raise Wrong("The network made ready makes other images.", **figures)
    return figures


SECTIONS = (env, philox, training, sampling, graphs, syncs, saver, resume, oom, ready)
