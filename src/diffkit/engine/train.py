"""The training loop. Its clock is images seen; everything random is a function of the seed and that clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffkit.core.denoiser import Denoiser
from diffkit.core.ema import Average, ema_decay, gamma_of, power_decay
from diffkit.core.weighing import Uncertainty, Weigh
from diffkit.engine.batches import Batch, Batches
from diffkit.engine.checkpoint import Checkpoint
from diffkit.engine.devices import release_memory
from diffkit.engine.distributed import ALONE, World
from diffkit.engine.gradients import SHARES, Gradients, Levels, Loss, Objective
from diffkit.engine.optimizer import AdamW, clip_gradients
from diffkit.engine.progress import NonFinite, OnNan, Progress, Report
from diffkit.engine.sums import GradientSums
from diffkit.engine.threads import beside
from diffkit.engine.turns import turns
from diffkit.errors import DiffkitError, ExitCode

__all__ = ["NonFinite", "OnNan", "Progress", "Recipe", "Reduced", "Remark", "State", "load_exactly", "train", "under"]


PIECES = 8


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training; lr per step, warmup and half-life in images, clip a gradient norm.

    `ema_lengths`: relative lengths of further averages, for `diffkit.engine.snapshots`. `learned_weighting`: see
    `diffkit.core.weighing.Uncertainty`. `exact_elastic`: gradients are computed of `PIECES` equal pieces of each batch
    and added in their order, whatever the number of processes.
    """

    batch_size: int
    micro_batch: int
    lr: float
    warmup_images: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema_half_life: float
    seed: int
    ema_lengths: tuple[float, ...] = ()
    learned_weighting: bool = False
    exact_elastic: bool = False


@dataclass(frozen=True)
class Reduced:
    """The device's memory did not hold a pass: from here on passes have `micro_batch` images. Nothing else changes."""

    images_seen: int
    micro_batch: int


@dataclass(frozen=True)
class Remark:
    """What people may want to know of how the training is computed from here on."""

    images_seen: int
    text: str


class OutOfMemory(DiffkitError):
    """The memory does not hold a pass of one image (exit code 4)."""


class State:
    """Network, average, further averages by length (`tracks`), optimiser, images seen: what a checkpoint holds.

    `trained`: the network's parameters that training changes. `updating`: whether a step is changing it at this moment,
    so that it is of two steps at once.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.tracks = {length: copy.deepcopy(self.average) for length in recipe.ema_lengths}
        self._average = Average(self.average, network)
        self._tracks = {length: Average(track, network) for length, track in self.tracks.items()}
        self.images_seen = 0
        self.updating = False
        parameters = self.trained = [p for p in network.parameters() if p.requires_grad]
        device = parameters[0].device.type
        self.uncertainty = Uncertainty().to(device) if recipe.learned_weighting else None
        if self.uncertainty is not None:
            parameters = [*parameters, *self.uncertainty.parameters()]
        fused = True if device in {"cpu", "cuda"} else None
        self.optimizer = AdamW(parameters, recipe.betas, recipe.weight_decay, fused)

    def checkpoint(self) -> Checkpoint:
        """What is saved of it as it is now: the very tensors, which training goes on to change."""
        tensors: dict[str, Tensor] = {}
        trained = set()
        for prefix, module in self._modules().items():
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
            trained |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        for index, slots in self.optimizer.slots.items():
            own = {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
            tensors |= own
            trained |= own.keys()
        return Checkpoint(tensors, self.images_seen, frozenset(trained))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a snapshot. Raises DiffkitError naming the first tensor that does not fit."""
        for prefix, module in self._modules().items():
            load_exactly(module, under(checkpoint.tensors, f"{prefix}."))
        self.optimizer.restore(under(checkpoint.tensors, "optimizer."))
        self.images_seen = checkpoint.images_seen

    def update(self, recipe: Recipe, lr: float, finite: Tensor | None = None) -> None:
        """One step along the gradients. Where `finite`, one flag on the device, is false, only `images_seen` moves."""
        self.updating = True
        seen = self.images_seen + recipe.batch_size
        self.optimizer.step(lr, finite)
        decay = ema_decay(seen, recipe.batch_size, recipe.ema_half_life)
        self._average.update(decay, finite)
        for length, track in self._tracks.items():
            track.update(power_decay(seen, recipe.batch_size, gamma_of(length)), finite)
        self.images_seen = seen
        self.updating = False

    def forget_pass(self) -> None:
        """Be as after the last step: a pass changes buffers of the network, of which the average has copies."""
        self.optimizer.forget_gradients()
        for kept, own in self._average.buffers():
            own.copy_(kept)

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {f"track-{length:g}": track for length, track in self.tracks.items()}
        if self.uncertainty is not None:
            modules["uncertainty"] = self.uncertainty
        return {"network": self.network, "average": self.average, **modules}


def train(
    state: State,
    denoiser: Denoiser,
    batches: Batches,
    levels: Levels,
    objective: Objective,
    recipe: Recipe,
    *,
    weigh: Weigh | None = None,
    until_images: int | None = None,
    report_every: int = 1,
    world: World = ALONE,
    before_update: Callable[[], None] = lambda: None,
    cuda_graphs: bool = True,
    on_nan: OnNan = "abort",
    passed_over: Collection[int] = (),
) -> Iterator[Progress | Reduced | Remark | NonFinite]:
    """Train `state` from where it is, yielding after every step, for ever or until `until_images` have been seen.

    `levels` maps t in (0, 1) to noise levels; `denoiser` wraps `state.network`; what `objective` finds is the loss
    unless `weigh`, and then the state's learned weighting, make it another. Every `report_every` steps the loss comes
    back from the device. Where it, or the norm of the gradients, is not finite, raises Diverged (exit code 6); with
    `on_nan` "skip" the step's update is left out, decided on the device. On a CPU that is noticed at once, and the
    state is still that before the step. Batches that begin at a position in `passed_over` are not trained on.

    Where a pass is too much for the memory, the step is tried again in passes of half as many images, down to one.
    Each process of `world` takes its share of every batch; all of them take the same steps. `before_update` is called
    when the gradients are there and weights, averages and moments are about to change. `cuda_graphs`: see
    `diffkit.engine.gradients.Gradients`.
    """
    _check_shares(recipe, world)
    device = next(state.network.parameters()).device
    report = Report()
    at_once = device.type == "cpu" or (on_nan == "skip" and device.type != "cuda")
    weighings = [each for each in (weigh, state.uncertainty) if each is not None]
    loss = Loss(denoiser, levels, objective, weighings, recipe.seed)
    gradients = Gradients(
        loss, state.network, state.optimizer, recipe.batch_size, cuda_graphs and not recipe.exact_elastic
    )
    sums = GradientSums(state.optimizer.parameters, world) if world.size > 1 and not recipe.exact_elastic else None
    if sums is not None:
        gradients.around_last_pass = sums.last_pass
    share = world.share(recipe.batch_size)
    micro_batch = min(recipe.micro_batch, -(-recipe.batch_size // world.size))
    piece = recipe.batch_size // PIECES if recipe.exact_elastic else None
    with beside("reader") as reader, turns(device, world.size) as turn, sums or nullcontext():
        pinned = device.type == "cuda"

        def read(first: int) -> Future[Batch]:
            return reader.submit(batches.batch, first + share.start, share.stop - share.start, pinned)

        following = read(state.images_seen)
        while until_images is None or state.images_seen < until_images:
            start = time.perf_counter()
            turn.take()
            waiting = time.perf_counter()
            batch = following.result()
            report.waited += time.perf_counter() - waiting
            first = state.images_seen + recipe.batch_size
            step = first // recipe.batch_size
            following = read(first)

            lr = recipe.lr * min(1.0, first / max(recipe.warmup_images, 1))
            sound = True
            if state.images_seen in passed_over:
                state.images_seen = first
            else:
                while world.any((found := _gradients(gradients, batch, micro_batch, state, piece, sums)) is None):
                    state.forget_pass()
                    release_memory()
                    if micro_batch == 1:
                        raise _out_of_memory(device)
                    micro_batch = max(1, micro_batch // 2)
                    yield Reduced(state.images_seen, micro_batch)
                assert found is not None
                if gradients.remark:
                    yield Remark(state.images_seen, gradients.remark)
                    gradients.remark = None
                mean, by_level = _summed(found, state, world) if recipe.exact_elastic else found[0]
                grad_norm = clip_gradients(state.trained, recipe.clip)
                report.add(step, mean, by_level, grad_norm)
                finite = None
                if at_once or on_nan == "skip":
                    finite = torch.isfinite(mean) & torch.isfinite(grad_norm)
                sound = not at_once or bool(finite)
                if sound:
                    before_update()
                    state.update(recipe, lr, None if at_once else finite)
                else:
                    state.forget_pass()
            progress, others = Progress(first, step, lr), list[NonFinite]()
            if step % report_every == 0 or first == until_images or not sound:
                progress, others = report.read(progress, recipe.batch_size, time.perf_counter() - start, on_nan)
            else:
                report.busy += time.perf_counter() - start
            state.images_seen = first
            yield from others
            yield progress


def _check_shares(recipe: Recipe, world: World) -> None:
    """Raises DiffkitError unless the processes can share a batch."""
    batch = recipe.batch_size
    if batch < world.size:
        raise DiffkitError(
            f"A batch of {batch} images cannot be shared by {world.size} processes.",
            "Give a larger --batch-size, or start fewer processes.",
        )
    if recipe.exact_elastic and (batch % PIECES or PIECES % world.size):
        raise DiffkitError(
            f"--exact-elastic makes {PIECES} pieces of a batch: {batch} images in {world.size} processes do not fit.",
            f"--batch-size must be a multiple of {PIECES}, and the number of processes 1, 2, 4 or {PIECES}.",
        )


def _gradients(
    gradients: Gradients, batch: Batch, micro_batch: int, state: State, piece: int | None, sums: GradientSums | None
) -> list[list[Tensor]] | None:
    """Loss and errors by level of each `piece` images (None: of all), with a copy of its gradients where it is not all.

    With `sums`, all of that over all processes. None if the memory does not hold a pass.
    """
    if piece is None:
        whole: Sequence[Tensor] | None = gradients(batch, micro_batch)
        if sums is not None:
            whole = sums.finish(whole, like=_nothing(gradients.device))
        return None if whole is None else [list(whole)]
    result = []
    for part in batch.split(piece):
        found = gradients(part, micro_batch)
        if found is None:
            return None
        result.append([*found, *(gradient.clone() for gradient in _gradients_of(state))])
    return result


def _summed(found: list[list[Tensor]], state: State, world: World) -> list[Tensor]:
    """Loss and errors by level over all pieces; the gradients in the parameters become sums too."""
    loss, by_level, *sums = world.add_in_order(found)
    for parameter, gradient in zip(state.optimizer.parameters, sums, strict=True):
        parameter.grad = gradient
    return [loss, by_level]


def _nothing(device: torch.device) -> list[Tensor]:
    """Loss and errors by level of no image."""
    return [torch.zeros((), device=device), torch.zeros(2, SHARES, device=device)]


def _gradients_of(state: State) -> list[Tensor]:
    """The gradient of every trained parameter: zeros where it had no part in the loss."""
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in state.optimizer.parameters
    ]


def load_exactly(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`load_state_dict`, with the first tensor that is missing, left over or of another shape named."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        here, there = own.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise DiffkitError(
                f"The saved weights do not fit this network: {name} is {_shape(there)} in the file "
                f"and {_shape(here)} in the network.",
                "The backbone's plugin may have changed since; install the version the run records.",
                code=ExitCode.MODEL,
            )
    module.load_state_dict(tensors)


def _out_of_memory(device: torch.device) -> DiffkitError:
    return OutOfMemory(
        f"The memory of {device} does not hold this network with a single image.",
        "Choose a smaller one with --preset, or smaller images with --size.",
        code=ExitCode.MACHINE,
    )


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
