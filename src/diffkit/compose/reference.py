"""Real images, looked at once, that made images are measured against."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from diffkit import paths, records
from diffkit.compose.model import Model
from diffkit.compose.parts import completed
from diffkit.config import PartChoice
from diffkit.engine.distributed import ALONE, World
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.measure.copying import View
    from diffkit.measure.images import ImageSet
    from diffkit.measure.scores import Names

Step = TypeVar("Step")
Result = TypeVar("Result")

AGAINST = ("train", "holdout", "all")
REAL = {"train": "Real images", "holdout": "Held-out images"}


@dataclass(frozen=True)
class Working:
    """What is being done, and how much of it is done."""

    what: str
    done: int
    total: int


def told(work: Generator[Step, None, Result], as_event: Callable[[Step], Working]) -> Generator[Working, None, Result]:
    """Do the work, yielding each of its steps as an event; returns its result."""
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        yield as_event(step)


def run_through(work: Generator[Working, None, Result]) -> Result:
    """The result of work whose progress nobody looks at."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


class Reference:
    """Real images, looked at through one extractor: what made images are measured against."""

    def __init__(
        self,
        data: Path,
        extractor: str,
        device: torch.device,
        crop: tuple[int, int] | None = None,
        world: World = ALONE,
    ) -> None:
        """`crop`: for a model that was trained on crops of larger prepared images; `world`: who shares the looking.

        Raises DiffkitError for an unknown extractor or missing weights, and for images that cannot be read.
        """
        from diffkit.measure.images import open_images

        self.device, self.world = device, world
        self.note = ""  # what has to be said of these data beside every figure
        self.choice, build = completed("extractors", PartChoice.model_validate(extractor))
        self.network: nn.Module = build().to(device)
        self.names = _names(self.network, self.choice.name)
        self.path = data
        self.train, self.held_out = open_images(data, crop)
        self._features: dict[str, Tensor] = {}
        self._pixels: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: Model, data: Path | None, extractor: str) -> Reference:
        """For the images of a model: the data given, or its own. Raises DiffkitError if they cannot be compared."""
        crop = (model.spec.height, model.spec.width) if model.settings.data.size else None
        reference = cls(data or own_data(model), extractor, model.device, crop, model.world)
        own = model.settings.data.fingerprint
        if own and not reference.train.fingerprint.startswith(own):
            reference.note = f"{data} is not the data set that the model was trained on."
        here = Path(os.path.abspath(model.settings.data.path))
        if data is None and here != reference.path and os.path.exists(here):
            reference.note = f"The model was trained on {reference.path}; {here} holds other data."
        return reference

    def look(self) -> Generator[Working, None, None]:
        """Compute what is seen of all real images, or take it from the cache."""
        from diffkit.measure.copying import Pixels

        for part, images in self.parts.items():
            if part in self._features:
                continue
            self._features[part] = yield from self._look(REAL[part], images, self.network, str(self.choice))
            self._pixels[part] = yield from self._look(REAL[part], images, Pixels(), "pixels")

    def features(self, part: str) -> Tensor:
        """float32 [N, D] of "train", "holdout" or "all"; after `look`."""
        import torch

        if part == "all":
            return torch.cat([self._features[each] for each in self.parts])
        return self._features[part]

    def labels(self, part: str) -> list[str | None] | None:
        """A class name (or None) for each image of that part; None for a set without classes."""
        chosen = [images for each, images in self.parts.items() if part in ("all", each)]
        if any(images.labels is None for images in chosen):
            return None
        return [label for images in chosen for label in images.labels or ()]

    def check_part(self, part: str) -> None:
        """Raises DiffkitError if nothing was held out and that is what is asked for."""
        if part == "holdout" and self.held_out is None:
            raise DiffkitError(
                f"{self.path} has no held-out images.",
                "Compare with --against train, or prepare the images again with --holdout 5%.",
                code=ExitCode.DATA,
            )

    def check_fits(self, model: Model) -> None:
        """Raises DiffkitError unless the model's images can be compared with these."""
        from diffkit.measure.images import check_shapes

        spec = model.spec
        check_shapes("the model", (spec.height, spec.width, spec.channels), str(self.path), self.train.shape)
        unknown = sorted({*(self.labels("all") or ())} - {None, *spec.classes}, key=str)
        if spec.classes and unknown:
            raise DiffkitError(
                f"{self.path} has a class '{unknown[0]}' that the model does not know.",
                f"It knows: {', '.join(spec.classes)}.",
                code=ExitCode.DATA,
            )

    @property
    def parts(self) -> Mapping[str, ImageSet]:
        """The sets there are."""
        return {"train": self.train} | ({"holdout": self.held_out} if self.held_out else {})

    def look_at(self, images: ImageSet) -> Generator[Working, None, Tensor]:
        """Returns the features of other images."""
        return (yield from self._look("Made images", images, self.network))

    def pixels_of(self, images: ImageSet) -> Generator[Working, None, Tensor]:
        """Returns other images as they are compared pixel by pixel."""
        from diffkit.measure.copying import Pixels

        return (yield from self._look("Made images", images, Pixels()))

    def nearest(self, found: Tensor, pixels: Tensor) -> list[View]:
        """The nearest training images of other images, by features (`found`) and by pixels."""
        from diffkit.measure.copying import View, mirrored, neighbours

        train = self._pixels["train"]
        views = []
        for made, held_out, versions in (
            (found, self._features.get("holdout"), (self._features["train"],)),
            (pixels, self._pixels.get("holdout"), (train, mirrored(train))),
        ):
            views.append(
                View(
                    made=neighbours(made, *versions),
                    among_train=neighbours(versions[0], *versions, skip_self=True),
                    held_out=None if held_out is None else neighbours(held_out, *versions),
                )
            )
        return views

    def _look(
        self, what: str, images: ImageSet, network: nn.Module, kept_as: str = ""
    ) -> Generator[Working, None, Tensor]:
        """What this network sees of the images; `kept_as`: the name under which that is cached."""
        from diffkit.measure.features import features

        work = features(images, network, self.device, kept_as, self.world)
        return (yield from told(work, lambda done: Working(what, done, images.count)))


def own_data(model: Model) -> Path:
    """The data set that the model was trained on, known by its fingerprint.

    It is looked for where the run's last start had it, then at the same place relative to the run, then at the path
    that training was given. Raises DiffkitError (exit code 3) if it is at none of these.
    """
    from diffkit.engine.store import INDEX_FILE, Store

    places = dict.fromkeys(Path(os.path.abspath(place)) for place in _places(model))
    others = []
    for place in places:
        if not paths.exists(place / INDEX_FILE):
            continue
        found = Store.open(place, verify=False).fingerprint
        if found == (model.settings.data.fingerprint or found):
            return place
        others.append(place)
    of = model.path or "the model"
    if others:
        message = f"{others[0]} holds other data than those that {of} was trained on."
        hint = "Name the right ones: --data DATA. Other data that are named are used too, with a note."
    else:
        message = f"The data that {of} was trained on are no longer at {' or '.join(map(str, places))}."
        hint = "Name them: --data DATA."
    raise DiffkitError(message, hint, code=ExitCode.DATA)


def _places(model: Model) -> Iterator[str | Path]:
    """Where the data may lie."""
    if model.path is not None:
        run = RunDir(model.path.parent)
        for session in [each for each in records.sessions(run.sessions) if each][-1:]:
            if session.get("data") is not None:
                yield session["data"]
            if session.get("data_from_run") is not None:
                yield run.path / session["data_from_run"]
    yield model.settings.data.path


def _names(network: nn.Module, name: str) -> Names:
    from diffkit.measure.scores import Names

    return Names(*getattr(network, "distance_names", (f"FD-{name}", f"KD-{name}")))
