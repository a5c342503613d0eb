"""The gradients of a batch: in one pass or in several, launched kernel by kernel or all together, as a CUDA graph."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffkit.core.denoiser import Condition, Denoiser
from diffkit.core.random import Purpose, derived_seed, golden, normal
from diffkit.core.weighing import Weigh
from diffkit.engine.batches import Batch
from diffkit.engine.devices import finish, first_line, free_bytes, is_memory, memory_bytes
from diffkit.engine.functions import fast_functions
from diffkit.engine.graphs import Graph, graphs_on, near, record
from diffkit.engine.optimizer import AdamW

Objective: TypeAlias = Callable[[Denoiser, Tensor, Tensor, Tensor, Condition], Tensor]
Levels: TypeAlias = Callable[[Tensor], Tensor]
SHARES = 8
MOST_POSITIONS = 2**21
"""Images times height times width, above which no graph is tried: kernels take longer than their launches."""
WARM_UP, TIMED = 2, 3
STEPS_TRIED = WARM_UP + 2 * TIMED
SMALL_GRADIENT = 1e-3
"""Of the norm of all gradients: parameters with less may have nothing but rounding."""
GAIN_WANTED = 1.05


@dataclass(frozen=True)
class Loss:
    """The loss of images: what `objective` finds, unless each of `weighings` makes it another."""

    denoiser: Denoiser
    levels: Levels
    objective: Objective
    weighings: Sequence[Weigh]
    seed: int

    def __call__(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and unweighted error [B] on the device, and t [B] in (0, 1), where the batch's positions lie."""
        clean, condition, positions = batch.to(device)
        t = golden(self.seed, Purpose.TRAIN_LEVEL, batch.positions)
        s = self.levels(t)
        noise = normal(self.seed, Purpose.TRAIN_NOISE, positions, clean.shape[1:])
        errors = losses = self.objective(self.denoiser, clean, s, noise, condition)
        for weigh in self.weighings:
            losses = weigh(losses, s)
        return losses, errors.detach(), t


class Gradients:
    """What a step begins with. The gradients are left in the parameters.

    On a GPU the steps of small batches are also tried as a CUDA graph, if `graphs`: after a few of them one is
    recorded and compared with the gradients it stands for; it stays if the next ones are faster by it. All are steps of
    the training. `remark`: what came of that, for people, once it is known. `around_last_pass`: entered around the pass
    that completes the gradients, unless it is replayed.
    """

    def __init__(self, loss: Loss, network: nn.Module, optimizer: AdamW, batch_size: int, graphs: bool) -> None:
        """`batch_size`: of all processes; the loss is a mean over so many images."""
        self.loss, self.network, self.optimizer, self.batch_size = loss, network, optimizer, batch_size
        self.device = next(network.parameters()).device
        self.remark: str | None = None
        self.around_last_pass: Callable[[], AbstractContextManager[object]] = nullcontext
        self._trial = _Trial() if graphs and graphs_on(self.device) else None
        self._graph: Graph | None = None
        self._graphs_own: list[Tensor | None] = []

    def __call__(self, batch: Batch, micro_batch: int) -> tuple[Tensor, Tensor] | None:
        """The batch's part of the loss, and of its errors [2, SHARES]: sum and number by share of the noise levels.

        Both on the device. None if the memory does not hold passes of `micro_batch` images.
        """
        if not self.network.training:  # sets it for every module, one after another
            self.network.train()
        at_once = len(batch.positions) <= micro_batch
        if not at_once:  # and never will be again
            self._forget()
        try:
            if self._trial is not None and at_once and len(batch.positions) * math.prod(batch.size) <= MOST_POSITIONS:
                return self._tried(self._trial, batch)
            if self._graph is not None and at_once:
                return self._replayed(self._graph, batch)
            return self._launched(batch.split(micro_batch))
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
        self._forget()
        self.optimizer.forget_gradients()
        return None

    def _forget(self) -> None:
        self._trial = self._graph = None
        self._graphs_own = []

    def _launched(self, passes: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        self.optimizer.forget_gradients()
        found = []
        for number, batch in enumerate(passes, 1):
            self._seed(batch)
            # While graphs are tried, gradients have to be this process's own until the pass is over.
            last = number == len(passes) and self._trial is None
            with self.around_last_pass() if last else nullcontext():
                found.append(self._pass(batch))
        losses, by_level = zip(*found, strict=True)
        return torch.stack(losses).sum(), torch.stack(by_level).sum(0)

    def _replayed(self, graph: Graph, batch: Batch) -> tuple[Tensor, Tensor]:
        self._seed(batch)
        loss, by_level = graph(*batch.tensors)
        for parameter, gradient in zip(self.optimizer.parameters, self._graphs_own, strict=True):
            parameter.grad = gradient
        return loss, by_level

    def _seed(self, batch: Batch) -> None:
        """For what the network itself draws (dropout)."""
        torch.manual_seed(derived_seed(self.loss.seed, Purpose.NETWORK, int(batch.positions[0])))

    def _pass(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward. Of a batch on the device nothing is sent there, and nothing waited for."""
        with fast_functions(self.device):
            losses, errors, t = self.loss(batch, self.device)
            loss = losses.sum() / self.batch_size
            loss.backward()
        return loss.detach(), _by_level(t, errors)

    def _tried(self, trial: _Trial, batch: Batch) -> tuple[Tensor, Tensor]:
        """A step as the trial has it next, timed."""
        finish(self.device)
        start = time.perf_counter()
        found = self._launched([batch]) if self._graph is None else self._replayed(self._graph, batch)
        finish(self.device)
        (trial.launched if self._graph is None else trial.replayed).append(time.perf_counter() - start)
        if len(trial.replayed) == TIMED:
            self._trial = None
            if trial.gain >= GAIN_WANTED:
                self.remark = f"Steps are launched as one CUDA graph, {trial.gain:.1f} times as fast."
            else:
                self._forget()
                self.remark = "Steps are not launched as one CUDA graph: they are as fast without."
        elif len(trial.launched) == WARM_UP + TIMED and self._graph is None:
            problem = self._record(batch)
            if problem:
                self.remark = f"Steps are not launched as one CUDA graph: {problem}"
                self._forget()
        return found

    def _record(self, batch: Batch) -> str | None:
        """The graph of a step, compared with this batch's gradients, which stay as they are; or what is wrong."""
        parameters = self.optimizer.parameters
        wanted = [parameter.grad for parameter in parameters]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.network.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        before, drawn = memory_bytes(self.device), _drawn(self.device)

        def work(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            self.optimizer.forget_gradients()
            return self._pass(batch.holding(tensors))

        try:
            self._graph = record(work, batch.tensors, self.device)
            self._graphs_own = [parameter.grad for parameter in parameters]
            if any(getattr(module, name) is not buffer for module, name, buffer, _ in buffers):
                return "the network replaces its buffers."
            if drawn != _drawn(self.device):
                return "the network draws random numbers outside the device."
            left = free_bytes(self.device)
            if before is not None and left is not None and left < before - left:
                return "it would leave too little memory."
            self._replayed(self._graph, batch)
            least = SMALL_GRADIENT * math.sqrt(sum(float(each.norm()) ** 2 for each in wanted if each is not None))
            pairs = zip(self._graphs_own, wanted, strict=True)
            return None if all(near(own, other, least) for own, other in pairs) else "its gradients are not the same."
        except Exception as error:
            cause = error.__context__  # of the end of a recording that had failed before
            return first_line(cause if isinstance(cause, Exception) else error)
        finally:
            for parameter, gradient in zip(parameters, wanted, strict=True):
                parameter.grad = gradient
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)


def _drawn(device: torch.device) -> object:
    """What changes when numbers are drawn that no replay draws again: Python's own and, of a GPU, those on the CPU."""
    return random.getstate(), None if device.type == "cpu" else bytes(torch.get_rng_state())


class _Trial:
    """Seconds of steps, launched and replayed."""

    def __init__(self) -> None:
        self.launched: list[float] = []
        self.replayed: list[float] = []

    @property
    def gain(self) -> float:
        return median(self.launched[WARM_UP:]) / median(self.replayed)


def _by_level(t: Tensor, errors: Tensor) -> Tensor:
    """[2, SHARES]: the sum and the number of errors [B] at t [B] in (0, 1)."""
    shares = (t * SHARES).long().to(errors.device, non_blocking=True)
    result = torch.zeros(2, SHARES, device=errors.device)
    return result.index_add_(1, shares, torch.stack([errors, torch.ones_like(errors)]))
