"""Batch size and learning rate of a new run, where they are not given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diffkit.compose.parts import trial_network
from diffkit.config import Settings
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec

if TYPE_CHECKING:
    import torch

    from diffkit.engine.store import Store


LARGE_PASS = 2**20  # pixels
LEAST_STEPS = 8
"""Of a pass over the data, below which the batch does not grow with the number of GPUs."""


def with_batch(settings: Settings, spec: ImageSpec, store: Store, device: torch.device, processes: int) -> Settings:
    """Batch size and learning rate, unless given: from image size, data size, devices and parameters.

    Several GPUs get as many images each as one alone, as long as a pass over the data remains LEAST_STEPS steps. The
    rate then grows by the square root of the batch (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive
    Gradient Algorithms"), and the warm-up takes as many steps. Processes on a CPU share its cores and memory: nothing
    changes. Neither does the rate for a batch that is given.
    """
    from diffkit.engine.devices import activation_bytes, machine_memory, memory_bytes

    def image_bytes() -> int:
        network, inputs, condition = trial_network(settings, spec)
        return max(1, activation_bytes(lambda: network(*inputs, **condition)))

    parameters = sum(p.numel() for p in trial_network(settings, spec, run=False)[0].parameters())
    pixels = spec.height * spec.width
    train, memory = settings.train, memory_bytes(device)
    _check_network(parameters, memory or machine_memory())
    if train.batch_size is not None:
        batch = alone = train.batch_size
        _check_batch(batch, store)
    elif memory is None:
        batch = alone = min(64, max(8, 2**18 // pixels), _power_of_two(store.count))
    else:
        kept = 20 if processes == 1 else 24  # bytes a parameter; the last four are sent
        fits = (0.6 * memory - kept * parameters) / image_bytes()
        alone = min(256, _power_of_two(fits), _power_of_two(store.count))
        batch = max(alone, min(alone * processes, _power_of_two(store.count / LEAST_STEPS)))
    growth = batch / alone
    micro = min(train.micro_batch or alone, batch)
    own = machine_memory() if memory is None else None
    if own is not None and train.micro_batch is None and batch * pixels > LARGE_PASS:
        # A system that hands out memory it has not got would end the process without a word.
        micro = min(batch, _power_of_two(0.5 * own / image_bytes()))
    lr = train.lr or float(f"{min(2e-3, math.sqrt(growth) * max(1e-4, 2e-3 * math.sqrt(3e6 / parameters))):.1e}")
    update: dict[str, Any] = {"batch_size": batch, "micro_batch": micro, "lr": lr}
    if "warmup_images" not in train.model_fields_set:
        update["warmup_images"] = round(growth * train.warmup_images)
    return settings.model_copy(update={"train": train.model_copy(update=update)})


def _check_network(parameters: int, memory: int | None) -> None:
    """Raises DiffkitError for more parameters than fit: each with its average, its gradient and two moments."""
    needed = 5 * 4 * parameters
    if memory is not None and needed > memory:
        raise DiffkitError(
            f"A network of {parameters:,} parameters takes {needed / 2**30:,.0f} GiB of memory to train, "
            f"and {memory / 2**30:,.0f} GiB are there.",
            "Choose a smaller one: --preset, or the backbone's options.",
            code=ExitCode.MACHINE,
        )


def _check_batch(batch: int, store: Store) -> None:
    """Raises DiffkitError for more images than the machine can read at once: this batch, and the next beside it."""
    from diffkit.engine.devices import machine_memory

    each, memory = 2 * store.spec.height * store.spec.width * store.spec.channels, machine_memory()
    if memory is not None and batch * each > memory / 2:
        raise DiffkitError(
            f"A batch of {batch:,} images is too large for this machine, which has {memory / 2**30:.0f} GiB of memory.",
            f"At most {_power_of_two(memory / 2 / each):,} fit; from some thousands on there is nothing to gain.",
        )


def _power_of_two(most: float) -> int:
    """The greatest power of two up to `most`; at least 1."""
    return 1 << (int(max(most, 1)).bit_length() - 1)
