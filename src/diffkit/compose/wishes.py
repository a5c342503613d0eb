"""What images are to be: labels, inputs and masks, from what people write to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffkit.errors import DiffkitError, did_you_mean
from diffkit.interfaces import ImageSpec

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.engine.batches import Task
    from diffkit.engine.inputs import Pictures
    from diffkit.engine.sample import Given


@dataclass(frozen=True)
class Wishes:
    """What is wanted of each image: everything is taken in turn, image i gets number i modulo how many there are.

    labels [L, K]; inputs: what the model's task is shown; sources: what to begin with; masks: white = make anew; noise
    [L, C, H, W]: the noise to begin with.
    """

    labels: Tensor | None = None
    inputs: Pictures | None = None
    sources: Pictures | None = None
    masks: Pictures | None = None
    noise: Tensor | None = None
    task: Task | None = field(default=None, repr=False)
    seed: int = 0

    def __call__(self, indices: Sequence[int]) -> Given:
        """What `diffkit.engine.sample` is told of these images."""
        import torch

        from diffkit.core.random import Purpose, uniform
        from diffkit.engine.sample import Given

        label = None if self.labels is None else self.labels[[i % len(self.labels) for i in indices]]
        source, mask = _stacked(self.sources, indices), _mask(self.masks, indices)
        noise = None if self.noise is None else self.noise[[i % len(self.noise) for i in indices]]
        given = Given(label=label, source=source, mask=mask, noise=noise)
        shown = _stacked(self.inputs, indices)
        if self.task is None or shown is None:
            return given
        positions = torch.tensor(list(indices))
        image = self.task(shown, lambda count: uniform(self.seed, Purpose.TASK, positions, count), mask)
        if mask is None:
            return replace(given, image=image)
        # What is outside the mask is known, so it stays.
        return replace(given, image=image, source=shown)


def _stacked(pictures: Pictures | None, indices: Sequence[int]) -> Tensor | None:
    """float32 [B, C, H, W] in [-1, 1]."""
    if pictures is None:
        return None
    import numpy as np
    import torch

    from diffkit.engine.codec import decode

    return decode(torch.from_numpy(np.stack([pictures.read(i % len(pictures)) for i in indices])))


def _mask(pictures: Pictures | None, indices: Sequence[int]) -> Tensor | None:
    """[B, 1, H, W] of 0 and 1."""
    found = _stacked(pictures, indices)
    return None if found is None else (found[:, :1] > 0).float()


def label_vector(spec: ImageSpec, classes: Mapping[str, float], attributes: Mapping[str, float]) -> Tensor:
    """float32 [K]: shares of classes, values of attributes. Raises DiffkitError for what the model does not know."""
    import torch

    from diffkit.engine.labels import scaled

    label = torch.zeros(spec.label_width)
    for name, share in classes.items():
        label[_known("class", name, spec.classes)] = share
    known = [attribute.name for attribute in spec.attributes]
    for name, value in attributes.items():
        number = _known("attribute", name, known)
        attribute = spec.attributes[number]
        if not attribute.low <= value <= attribute.high:
            raise DiffkitError(
                f"{name} = {value:g} lies outside what the model has seen.",
                f"Choose {attribute.low:g} to {attribute.high:g}.",
            )
        place = len(spec.classes) + 2 * number
        label[place], label[place + 1] = scaled(value, attribute), 1.0
    return label


def class_labels(spec: ImageSpec, names: Sequence[str | None] | None) -> Tensor | None:
    """One label for each name (None = without); None if there are none to give."""
    if names is None:
        return None
    import torch

    if names and not spec.classes:
        raise DiffkitError("This model knows no classes.", "It was trained without labels; leave --class out.")
    return torch.stack([label_vector(spec, {} if name is None else {name: 1.0}, {}) for name in names])


def _known(what: str, name: str, known: Sequence[str]) -> int:
    if name in known:
        return list(known).index(name)
    plural = {"class": "classes"}.get(what, f"{what}s")
    if not known:
        raise DiffkitError(f"This model knows no {plural}.", "It was trained without such labels.")
    shown = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
    raise DiffkitError(f"No {what} '{name}'.", f"{did_you_mean(name, known)}It knows: {shown}.")
