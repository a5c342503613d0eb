"""What the command line asks of images, as the model's wishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.compose import Model
    from diffkit.compose.wishes import Wishes
    from diffkit.engine.inputs import Pictures

IMAGES = 64
WORDS = {"true": "1", "yes": "1", "false": "0", "no": "0"}


@dataclass(frozen=True)
class Asked:
    """Wishes, with the words for them: a class (None = none) for each in turn, the attributes, the images given."""

    wishes: Wishes
    classes: Sequence[str | None]
    label: dict[str, float]
    given: Pictures | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        classes: Sequence[str] = (),
        attributes: Sequence[str] = (),
        unlabelled: bool = False,
        size: str | None = None,
        inputs: Path | None = None,
        source: Path | None = None,
        mask: Path | None = None,
        crop: str | None = None,
        noise: Path | None = None,
        seed: int = 0,
    ) -> Asked:
        """Raises DiffkitError for what the model does not know, and for images that do not fit."""
        import torch

        from diffkit.cli.console import chosen_among, image_size, plain, say
        from diffkit.compose.parts import task_of, trait
        from diffkit.compose.wishes import Wishes, label_vector
        from diffkit.engine.inputs import open_masks, open_pictures
        from diffkit.errors import DiffkitError

        spec = model.spec
        if unlabelled and (classes or attributes):
            raise DiffkitError("--unlabelled contradicts --class and --set-label.", "Give one of them.")
        if crop is not None:
            chosen_among("--crop", crop, ["center", "pad"])
        mixture, names = _classes(spec.classes, classes)
        values = dict(_assignment(text, "--set-label") for text in attributes)
        if not (unlabelled or mixture or names or inputs or source or noise):
            names = list(spec.classes)
        kinds = [mixture] if mixture else [{name: 1.0} for name in names] or [{}]
        labels = [label_vector(spec, kind, values) for kind in kinds]
        large = image_size(size) if size else None
        if large and (large[0] < spec.height or large[1] < spec.width):
            raise DiffkitError(
                f"--size {size} is smaller than the {spec.height}x{spec.width} that the model was trained on.",
                f"Give {spec.height}x{spec.width} or more.",
            )
        target = large or (spec.height, spec.width)
        task = task_of(model.settings)
        if inputs is not None and task is None:
            raise DiffkitError("This model makes images from noise.", "To begin with images of yours: --from FILE.")
        if source is not None and task is not None:
            raise DiffkitError(f"This model makes images from images ({model.settings.task}).", "Use --input FOLDER.")
        given = inputs or source
        if noise is not None and source is not None:
            raise DiffkitError("--noise and --from both say what to begin with.", "Give one of them.")
        if mask is not None and (given is None or (task is not None and not trait(task, "takes_mask"))):
            raise DiffkitError("--mask says which part of an image is made anew.", "Give the image: --from FILE.")
        if task is not None and trait(task, "takes_mask") and inputs is not None and mask is None:
            raise DiffkitError("This model fills holes in images.", "Say where they are: --mask FILE, white = a hole.")
        channels = spec.channels
        if inputs is not None and task is not None and trait(task, "needs_pairs"):
            channels = spec.image_channels
        pictures = None if given is None else open_pictures(given, target, channels, crop)
        for note in () if pictures is None else pictures.notes:
            say(f"[yellow]{plain(note)}[/]")
        masks = None if mask is None or pictures is None else open_masks(mask, pictures, target, crop)
        wishes = Wishes(
            torch.stack(labels) if spec.label_width else None,
            inputs=pictures if inputs is not None else None,
            sources=pictures if source is not None else None,
            masks=masks,
            noise=None if noise is None else read_noise(noise, (spec.channels, *target)),
            seed=seed,
        )
        shown: Sequence[str | None] = [_mixed(mixture)] if mixture else names or [None]
        return cls(wishes, shown, values, pictures, large)

    @property
    def count(self) -> int:
        """How many images, unless it is said."""
        if self.wishes.noise is not None:
            return len(self.wishes.noise)
        return len(self.given) if self.given is not None else IMAGES

    def again(self, noise: Tensor) -> Wishes:
        """The same labels, from this noise [N, C, H, W]."""
        return replace(self.wishes, sources=None, masks=None, noise=noise)

    def label_of(self, count: int) -> list[Tensor]:
        """Labels [K] in turn (of no length where the model knows none)."""
        import torch

        labels = self.wishes.labels
        return [torch.zeros(0) if labels is None else labels[index % len(labels)] for index in range(count)]


def pair_of_numbers(option: str, text: str | None) -> tuple[float, float] | None:
    """`0.2,5`. Raises DiffkitError for anything else."""
    from diffkit.errors import DiffkitError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise DiffkitError(f"{option} {text} is not two numbers.", f"Write {option} 0.2,5.") from None
    return low, high


def whole_numbers(option: str, text: str) -> list[int]:
    """`0,1,2`. Raises DiffkitError for anything else."""
    from diffkit.errors import DiffkitError
    from diffkit.names import shown

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise DiffkitError(
            f"{option} takes a list of numbers below 10^18, got {shown(text)}.", f"Write {option} 0,1,2."
        )
    return [int(part) for part in parts]


def read_noise(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The noise [N, C, H, W] that `diffkit invert` wrote. Raises DiffkitError if it is none, or another model's."""
    import numpy as np
    import torch

    from diffkit.errors import DiffkitError

    hint = "Take the noise.npy that diffkit invert writes."
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DiffkitError(f"{path} cannot be read: {error.strerror or error}.", hint) from error
    except (ValueError, EOFError) as error:
        raise DiffkitError(f"{path} is damaged or not a NumPy array.", hint) from error
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.ndim != 4 or found.shape[1:] != shape:
        wanted = "x".join(map(str, shape))
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "something else"
        raise DiffkitError(f"{path} holds {what}, and this model needs float32 [N, {wanted}].", hint)
    if not np.isfinite(found).all():
        raise DiffkitError(f"{path} holds values that are not finite.", "Run diffkit invert again.")
    return torch.from_numpy(np.array(found))


def _classes(known: Sequence[str], given: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """A mixture, if all have shares, or classes to take in turn."""
    from diffkit.errors import DiffkitError

    plain = [text for text in given if text in known or "=" not in text]
    if len(plain) == len(given):
        return {}, plain
    if plain:
        raise DiffkitError("Some classes have a share and some have none.", "Write --class cat=0.7 --class dog=0.3.")
    mixture = dict(_assignment(text, "--class") for text in given)
    total = sum(mixture.values())
    if min(mixture.values()) < 0 or total <= 0:
        raise DiffkitError("Shares of classes are positive.", "Write --class cat=0.7 --class dog=0.3.")
    return {name: share / total for name, share in mixture.items()}, []


def _mixed(mixture: dict[str, float]) -> str:
    return " + ".join(f"{share:.3g} {name}" for name, share in mixture.items())


def _assignment(text: str, option: str) -> tuple[str, float]:
    from diffkit.errors import DiffkitError

    name, equals, value = text.rpartition("=")
    number = math.nan
    with suppress(ValueError):
        number = float(WORDS.get(value.lower(), value))
    if not equals or not math.isfinite(number):
        raise DiffkitError(f"{option} {text} gives no number.", f"Write {option} name=0.5.")
    return name, number
