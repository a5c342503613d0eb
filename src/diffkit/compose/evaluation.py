"""An evaluation, from names to events: which images, which features, which figures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffkit.compose.model import Model
from diffkit.compose.parts import completed
from diffkit.config import PartChoice
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from diffkit.engine.sample import Plan
    from diffkit.measure.copying import Copying, View
    from diffkit.measure.downstream import Downstream, Labelled
    from diffkit.measure.estimate import Estimate
    from diffkit.measure.images import ImageSet
    from diffkit.measure.scores import Names

    Pixels: TypeAlias = npt.NDArray[np.uint8]

AGAINST = ("train", "holdout", "all")
SAMPLES = 1000
REAL = {"train": "Real images", "holdout": "Held-out images"}


@dataclass(frozen=True)
class Working:
    """What is being done, and how much of it is done."""

    what: str
    done: int
    total: int


@dataclass
class Evaluation:
    """What was found: figures, those of real against real images, by class, and whether the model copies."""

    extractor: str
    reference: dict[str, Any]
    samples: int
    metrics: list[Estimate] = field(default_factory=list)
    floor: list[Estimate] = field(default_factory=list)
    classes: dict[str, list[Estimate]] = field(default_factory=dict)
    copying: Copying | None = None
    downstream: Downstream | None = None
    closest: list[dict[str, Any]] = field(default_factory=list)
    picture: Pixels | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "extractor": self.extractor,
            "samples": self.samples,
            "reference": self.reference,
            "metrics": [each.to_dict() for each in self.metrics],
            "floor": [each.to_dict() for each in self.floor],
            "classes": {name: [each.to_dict() for each in found] for name, found in self.classes.items()},
            "copying": None if self.copying is None else self.copying.to_dict(),
            "downstream": None if self.downstream is None else self.downstream.to_dict(),
            "closest": self.closest,
            "notes": self.notes,
        }


class Reference:
    """Real images, looked at through one extractor: what made images are measured against, as often as one likes."""

    def __init__(self, data: Path, extractor: str, device: torch.device) -> None:
        """Raises DiffkitError for an unknown extractor or missing weights, and for images that cannot be read."""
        from diffkit.measure.images import open_images

        self.device = device
        self.choice, build = completed("extractors", PartChoice.model_validate(extractor))
        self.network: nn.Module = build().to(device)
        self.names = _names(self.network, self.choice.name)
        self.path = data
        self.train, self.held_out = open_images(data)
        self._features: dict[str, Tensor] = {}
        self._pixels: dict[str, Tensor] = {}

    def look(self) -> Generator[Working, None, None]:
        """Compute what is seen of all real images, or take it from the cache."""
        from diffkit.measure.copying import Pixels

        for part, images in self.parts.items():
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

    def look_for_copies(self, images: ImageSet, found: Tensor) -> Generator[Working, None, list[View]]:
        """Returns the nearest training images of other images, by features (`found`) and by pixels."""
        from diffkit.measure.copying import Pixels, View, mirrored, neighbours

        pixels = yield from self._look("Made images", images, Pixels())
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
        import torch

        from diffkit.measure.features import cached_features, features

        batches = features(images, network, self.device)
        if kept_as:
            batches = cached_features(images, kept_as, network, self.device)
        pieces: list[Tensor] = []
        done = 0
        for piece in batches:
            pieces.append(piece)
            done += len(piece)
            yield Working(what, done, images.count)
        return torch.cat(pieces)


def is_model(path: Path) -> bool:
    """Whether this is a run or a model, not a folder of images."""
    return path.is_file() or RunDir(path).exists or RunDir(path).model.exists()


def own_data(model: Model, path: Path) -> Path:
    """Where the data lie that the model was trained on. Raises DiffkitError if they are gone."""
    data = Path(model.settings.data.path)
    if not (data / "dataset.json").exists():
        raise DiffkitError(
            f"The data that {path} was trained on are no longer at {data}.",
            "Name them: --data DATA.",
            code=ExitCode.DATA,
        )
    return data


def evaluate(
    reference: Reference, images: ImageSet, against: str = "all", *, per_class: bool = False
) -> Generator[Working, None, Evaluation]:
    """Measure made images against real ones, yielding progress; returns the Evaluation.

    Raises DiffkitError for images of another size or mode, too few images, or labels that do not match.
    """
    from diffkit.measure.images import check_shapes
    from diffkit.measure.scores import caution, check_count, floor, scores

    reference.check_part(against)
    check_shapes(images.path, images.shape, str(reference.path), reference.train.shape)
    check_count(images.count, "made")
    yield from reference.look()
    real = reference.features(against)
    found = yield from reference.look_at(images)
    result = Evaluation(
        extractor=str(reference.choice),
        reference={"path": str(reference.path), "part": against, "images": len(real)},
        samples=images.count,
    )
    for number, estimate in enumerate(scores(real, found, reference.names)):
        if estimate is None:
            yield Working("Intervals", number, 20)
        else:
            result.metrics.append(estimate)
    result.notes += [text for text in [caution(real, found, reference.names)] if text]
    result.floor = floor(real, len(found), reference.names)
    if per_class:
        result.classes = _by_class(reference, against, real, images, found, result.notes)
    views = yield from reference.look_for_copies(images, found)
    _look_for_copies(reference, images, views, result)
    return result


def _by_class(
    reference: Reference, against: str, real: Tensor, images: ImageSet, found: Tensor, notes: list[str]
) -> dict[str, list[Estimate]]:
    from diffkit.measure.images import places
    from diffkit.measure.scores import LEAST, scores

    labels = reference.labels(against)
    if labels is None or images.labels is None:
        which = reference.path if labels is None else images.path
        raise DiffkitError(f"{which} has no classes: there is nothing to measure class by class.", "Leave --per-class.")
    unknown = sorted(set(images.labels) - set(labels) - {None}, key=str)
    if unknown:
        known = ", ".join(sorted({label for label in labels if label is not None}))
        raise DiffkitError(
            f"The made images have a class '{unknown[0]}' that the real ones have not.",
            f"The real ones have: {known}.",
            code=ExitCode.DATA,
        )
    result = {}
    for name in sorted({label for label in labels if label is not None}):
        one, other = real[places(labels, name)], found[places(images.labels, name)]
        if min(len(one), len(other)) < LEAST:
            notes.append(f"{name}: {len(one)} real and {len(other)} made images are too few to measure.")
        else:
            result[name] = [each for each in scores(one, other, reference.names) if each is not None]
    return result


def _look_for_copies(reference: Reference, images: ImageSet, views: Sequence[View], result: Evaluation) -> None:
    import numpy as np

    from diffkit.measure.copying import copying
    from diffkit.measure.nearest import COLUMNS, chosen, nearest_picture

    result.copying = verdict = copying(views)
    rows = chosen(verdict.scores)
    nearest = [views[int(verdict.views[row])].made for row in rows]
    columns = [near.indices[row, :COLUMNS].numpy() for near, row in zip(nearest, rows, strict=True)]
    distances = [near.distances[row, :COLUMNS].tolist() for near, row in zip(nearest, rows, strict=True)]
    pictures = np.stack([reference.train.read(each) for each in columns])
    flagged = (verdict.scores[rows] < 1).tolist()
    result.picture = nearest_picture(images.read(np.array(rows)), pictures, distances, flagged)
    result.closest = [
        {
            "sample": images.name(row),
            "nearest": reference.train.name(int(indices[0])),
            "distance": round(float(apart[0]), 4),
            "by": ("features", "pixels")[int(verdict.views[row])],
            "score": round(float(verdict.scores[row]), 4),
        }
        for row, indices, apart in zip(rows, columns, distances, strict=True)
    ]


def use_as_data(reference: Reference, images: ImageSet) -> Generator[Working, None, Downstream]:
    """Train classifiers on real images, on these, and on both; judge them on the held-out images.

    Raises DiffkitError without labels or held-out images, and for a class that the real images have not.
    """
    from diffkit.measure.downstream import downstream
    from diffkit.measure.images import check_shapes

    reference.check_part("holdout")
    assert reference.held_out is not None
    check_shapes(images.path, images.shape, str(reference.path), reference.train.shape)
    known = sorted({label for label in reference.train.labels or () if label is not None})
    sets = [_labelled(each, known) for each in (reference.train, images, reference.held_out)]
    steps = downstream(sets[0], sets[1], sets[2], len(known), reference.device)
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            found: Downstream = end.value
            return found
        yield Working("Classifiers", done, total)


def _labelled(images: ImageSet, known: Sequence[str]) -> Labelled:
    """The images of a set that have a label, with the labels' places among the known ones."""
    import numpy as np

    from diffkit.measure.downstream import Labelled

    if images.labels is None:
        raise DiffkitError(f"{images.path} has no classes: a classifier cannot learn from it.", "Leave --downstream.")
    for label in images.labels:
        if label is not None and label not in known:
            raise DiffkitError(
                f"{images.path} has a class '{label}' that the real images have not.",
                f"They have: {', '.join(known)}.",
                code=ExitCode.DATA,
            )
    chosen = [index for index, label in enumerate(images.labels) if label is not None]
    places = np.array([known.index(images.labels[index] or "") for index in chosen], np.int64)
    return Labelled(images.read(np.array(chosen, np.int64)), places)


@dataclass(frozen=True)
class Sampled:
    """New images, the network calls that each took, and the seconds that all took."""

    images: ImageSet
    calls: int
    seconds: float


def sampled(
    model: Model, plan: Plan, count: int, labels: Sequence[str | None] | None
) -> Generator[Working, None, Sampled]:
    """Make `count` images, kept in a file that vanishes; yields progress.

    `labels`: the classes of real images, in whose proportions the samples' classes are taken.
    """
    import numpy as np

    from diffkit.measure.images import made

    spec = model.spec
    classes = _proportional(labels, count) if spec.classes and labels else None
    codes = None if classes is None else [-1 if c is None else spec.classes.index(c) for c in classes]
    with tempfile.TemporaryFile() as file:
        pixels = np.memmap(file, np.uint8, "w+", shape=(count, spec.height, spec.width, spec.channels))
    calls, begun = 0, time.perf_counter()
    for batch in model.generate(plan, range(count), codes):
        pixels[batch.indices] = batch.pixels
        calls = batch.calls
        yield Working("Sampling", batch.indices[-1] + 1, count)
    return Sampled(made(pixels, classes, "the samples"), calls, time.perf_counter() - begun)


def _proportional(labels: Sequence[str | None], count: int) -> list[str | None]:
    """`count` labels that are distributed as these, spread evenly."""
    ordered = sorted(labels, key=lambda label: label or "")
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def _names(network: nn.Module, name: str) -> Names:
    from diffkit.measure.scores import Names

    return Names(*getattr(network, "distance_names", (f"FD-{name}", f"KD-{name}")))
