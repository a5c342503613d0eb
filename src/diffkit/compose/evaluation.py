"""An evaluation, from images to figures: scores, by class, copies, and use as training data."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffkit import paths
from diffkit.compose.reference import Reference, Working, told
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from diffkit.measure.copying import Copying, View
    from diffkit.measure.downstream import Downstream, Labelled
    from diffkit.measure.estimate import Estimate
    from diffkit.measure.images import ImageSet

    Pixels: TypeAlias = npt.NDArray[np.uint8]

SAMPLES = 1000


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


def is_model(path: Path) -> bool:
    """Whether this is a run or a model, not a folder of images."""
    return paths.is_file(path) or RunDir(path).exists or paths.exists(RunDir(path).model)


def evaluate(
    reference: Reference, images: ImageSet, against: str = "all", *, per_class: bool = False
) -> Generator[Working, None, Evaluation]:
    """Measure made images against real ones, yielding progress; returns the Evaluation.

    Of several processes, all look at images; the figures are in the leading one's Evaluation only.

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
    pixels = yield from reference.pixels_of(images)
    result = Evaluation(
        extractor=str(reference.choice),
        reference={"path": str(reference.path), "part": against, "images": len(real)},
        samples=images.count,
        notes=[*images.notes, *(note for each in reference.parts.values() for note in each.notes)],
    )
    if not reference.world.leads:
        return result
    for number, estimate in enumerate(scores(real, found, reference.names)):
        if estimate is None:
            yield Working("Intervals", number, 20)
        else:
            result.metrics.append(estimate)
    result.notes += [text for text in [reference.note, caution(real, found, reference.names)] if text]
    result.floor = floor(real, len(found), reference.names)
    if per_class:
        result.classes = _by_class(reference, against, real, images, found, result.notes)
    _look_for_copies(reference, images, reference.nearest(found, pixels), result)
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
    work = downstream(sets[0], sets[1], sets[2], len(known), reference.device)
    return (yield from told(work, lambda step: Working("Classifiers", *step)))


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
