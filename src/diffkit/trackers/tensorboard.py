"""TensorBoard: an event file in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit.interfaces import TrackedRun
from diffkit.trackers.library import required

if TYPE_CHECKING:
    from diffkit.interfaces import Log


@contextmanager
def tensorboard(run: TrackedRun, *, folder: str = "") -> Iterator[Log]:
    """TensorBoard event files, in RUN/tensorboard or in `folder`. See them with: tensorboard --logdir RUNS."""
    with required("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    import numpy as np
    from PIL import Image

    with SummaryWriter(folder or str(run.path / "tensorboard")) as writer:

        def log(images_seen: int, figures: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, images_seen)
            for name, path in pictures.items():
                pixels = np.asarray(Image.open(path).convert("RGB"))
                writer.add_image(name, pixels, images_seen, dataformats="HWC")

        yield log
