"""The lines of a run's JSON-lines files: what each kind of record has to hold, as far as it is read again.

Records of another form are passed over: these files tell of a training, and are not needed to go on with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from diffkit.durable import lines

MOST = 2**63


def _countable(value: int) -> int:
    if value >= MOST:
        raise ValueError("too large")
    return value


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError("a path out of the run")
    return value


Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Count = Annotated[NonNegativeInt, AfterValidator(_countable)]
Inside = Annotated[str, AfterValidator(_inside)]


class Record(BaseModel):
    """A line; whatever else it holds is kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class Step(Record):
    """A report of the training: means since the last one; null where a loss was not finite."""

    images: Count
    loss: Number | None
    grad_norm: Number | None = None
    lr: Number | None = None
    images_per_second: Number | None = None
    data_wait: Number | None = None
    loss_by_level: list[Number | None] = []
    non_finite: str | None = None


class Validation(Record):
    """A look at held-out images."""

    images: Count
    holdout_loss: Number
    training_loss: Number
    levels: list[Number]
    holdout_by_level: list[Number]
    training_by_level: list[Number]

    @model_validator(mode="after")
    def _fits(self) -> Validation:
        lengths = {len(self.levels), len(self.holdout_by_level), len(self.training_by_level)}
        if len(lengths) > 1 or not self.levels or self.training_loss <= 0:
            raise ValueError("not a loss at each of some noise levels")
        return self


class Preview(Record):
    """A grid of samples, and how it looks."""

    images: Count
    picture: Inside
    colour_mean: list[Number] = []
    colour_std: list[Number] = []
    contrast: Number | None = None
    limits: Number | None = None
    problems: list[str] = []

    @model_validator(mode="after")
    def _fits(self) -> Preview:
        if len(self.colour_mean) != len(self.colour_std) or len(self.colour_mean) > 4:
            raise ValueError("not a mean and a deviation of each channel")
        return self


class Session(Record):
    """A start of the training."""

    time: str = ""
    data: str | None = None
    data_from_run: str | None = None
    data_images: Count = 0
    data_holdout: Count = 0
    data_mean: list[Number] = []
    data_std: list[Number] = []
    command: list[str] = []


class Figure(Record):
    """A measured value; see `diffkit.measure.estimate.Estimate`."""

    name: str
    value: Number
    low: Number | None = None
    high: Number | None = None
    note: str = ""


class Share(Figure):
    """A proportion, which always has an interval."""

    low: Number
    high: Number


class Copying(Record):
    """How many samples are copies; see `diffkit.measure.copying.Copying`."""

    rate: Share
    baseline: Share | None = None
    alarm: bool = False


class Against(Record):
    """What was measured against."""

    part: str
    images: Count


class Evaluation(Record):
    """What samples of the model were worth."""

    images_seen: Count
    extractor: str
    samples: Count
    sampler: str
    steps: Count
    reference: Against
    metrics: list[Figure]
    floor: list[Figure] = []
    copying: Copying | None = None
    nearest: str | None = None
    while_training: bool = False


METRICS: dict[str, type[Record]] = {
    "non_finite": Step,
    "loss": Step,
    "holdout_loss": Validation,
    "picture": Preview,
}
"""The form of a line of metrics.jsonl, by the first of these keys that it has."""


def metrics(path: Path, only: str = "") -> Iterator[dict[str, Any] | None]:
    """The records of metrics.jsonl in turn, None for each that is passed over; `only`: those that have this key."""
    for line in lines(path):
        if not only or only in line:
            yield _valid(line, next((form for key, form in METRICS.items() if key in line), None))


def sessions(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of sessions.jsonl in turn, complete, None for each that is passed over."""
    return (_complete(line, Session) for line in lines(path))


def evaluations(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of evaluations.jsonl in turn, complete, None for each that is passed over."""
    return (_complete(line, Evaluation) for line in lines(path))


def _complete(line: dict[str, Any], form: type[Record]) -> dict[str, Any] | None:
    """With the defaults of what it does not hold."""
    return None if _valid(line, form) is None else form.model_validate(line).model_dump()


def _valid(line: dict[str, Any], form: type[Record] | None) -> dict[str, Any] | None:
    if form is None:
        return None
    try:
        form.model_validate(line)
    except ValidationError:
        return None
    return line
