"""Settings: config.toml <-> typed, validated values. A part with its options is written `name:key=value,key=value`."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from diffkit import paths
from diffkit.errors import DiffkitError, did_you_mean
from diffkit.names import shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_FILE = 2**20  # bytes
MANY = 10**12
"""More of anything that is counted than there is."""
MOST_GUIDANCE = 1000.0
Share = Annotated[float, Field(ge=0, lt=1)]
EmaLength = Annotated[float, Field(gt=0, le=0.288)]
Precision = Literal["auto", "float32", "bfloat16"]
NO_FLOAT16 = (
    "float16 is not offered: gradients below 6e-8 would be lost unless every loss was scaled by a factor that is "
    "adjusted step by step. GPUs without bfloat16 (compute capability below 8.0) compute in float32"
)


class PartChoice(BaseModel):
    """A part's name and the options given for it; in TOML a table with `name` and the options beside it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_any(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_part(value)
        if isinstance(value, Mapping) and "options" not in value:
            options = {key: option for key, option in value.items() if key != "name"}
            return {"name": value.get("name"), "options": options}
        return value

    def table(self) -> dict[str, Any]:
        """The TOML table."""
        return {"name": self.name, **self.options}

    def over(self, other: PartChoice) -> PartChoice:
        """This choice; where it is silent the other's options hold, if that is the same part."""
        kept = other.options if other.name == self.name else {}
        return PartChoice(name=self.name, options={**kept, **self.options})

    def text(self, between: str) -> str:
        """The options as words."""
        return between.join(f"{key}={_written(value)}" for key, value in self.options.items())

    def __str__(self) -> str:
        return f"{self.name}:{self.text(',')}" if self.options else self.name


def _named(values: Any, section: type[BaseModel]) -> Any:
    """A part's table without a name keeps the default part: `--set backbone.dropout=0.1`."""
    if not isinstance(values, Mapping):
        return values
    named = dict(values)
    for key, field in section.model_fields.items():
        if field.annotation is PartChoice and isinstance(named.get(key), Mapping):
            named[key] = {"name": field.default.name, **named[key]}
    return named


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _parts(cls, values: Any) -> Any:
        return _named(values, cls)


class DataSettings(_Section):
    """What is trained on, and how its images are varied."""

    path: str = ""
    fingerprint: str = ""
    size: list[int] | None = Field(None, min_length=2, max_length=2, description="height, width of the crops")
    flip: bool = Field(True, description="mirror half of the images; off for text, digits, anything handed")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of images shown without their label")


class NoiseSettings(_Section):
    """The model's own range of noise levels, and the schedule's shift."""

    s_min: float = Field(0.002, ge=1e-9)
    s_max: float | None = Field(None, gt=0, le=1e9, description="default: 80 * sqrt(height * width) / 32")
    shift: float = Field(1.0, ge=1e-6, le=1e6, description="multiplies s; above 1 = more noise")


class TrainSettings(_Section):
    """The training itself; the clock is images seen."""

    batch_size: int | None = Field(None, ge=1, le=MANY)
    micro_batch: int | None = Field(None, ge=1, le=MANY, description="images per pass; default: the whole batch")
    lr: float | None = Field(None, gt=0)
    warmup_images: int = Field(10_000, ge=0, le=MANY)
    betas: list[Share] = Field([0.9, 0.99], min_length=2, max_length=2)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_half_life: float = Field(500_000, gt=0, description="images")
    ema_snapshots: int = Field(0, ge=0, le=1000, description="kept for averages of any length after training; 0 = none")
    ema_lengths: list[EmaLength] = Field([0.05, 0.1], min_length=1, description="relative lengths of what they hold")
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Precision = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    channels_last: bool | None = Field(None, description="the network's layout in memory; default: the faster one")
    fused: bool | None = Field(None, description="norms by diffkit's own kernels; default: where they are faster")
    cuda_graphs: bool = Field(True, description="launch the kernels of a small step together, where that is faster")
    init: str = Field("", description="the model that training started from")
    exact_elastic: bool = Field(False, description="sum gradients so that any number of processes gives the same bits")
    learned_weighting: bool = Field(False, description="weigh the noise levels by their expected error, learned")

    @field_validator("precision", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value == "float16":
            raise ValueError(NO_FLOAT16)
        return value


class SampleSettings(_Section):
    """How previews are made, and `diffkit sample` unless it is told otherwise."""

    sampler: PartChoice = PartChoice(name="deis")
    scheduler: PartChoice = PartChoice(name="karras")
    steps: int = Field(15, ge=1, le=100_000)
    guidance: float = Field(1.0, ge=-MOST_GUIDANCE, le=MOST_GUIDANCE)


class Settings(_Section):
    """Everything a run is made of; `config.toml` is this, resolved."""

    scheduler: PartChoice = PartChoice(name="cosine")
    prediction: PartChoice = PartChoice(name="edm")
    backbone: PartChoice = PartChoice(name="unet")
    weighting: PartChoice | None = Field(None, description="of the loss; by default the network's own output counts")
    task: PartChoice | None = Field(None, description="image to image: what the network is shown")
    preset: str | None = Field(None, description="of the backbone; recorded as the options it stands for")
    near: bool | None = Field(
        None, description="learn the difference from what the task shows; default: as the task is"
    )
    data: DataSettings = DataSettings()
    noise: NoiseSettings = NoiseSettings()
    train: TrainSettings = TrainSettings()
    sample: SampleSettings = SampleSettings()
    parts: dict[str, dict[str, str]] = Field(default_factory=dict, description="who brought each part")


def parse_part(text: str) -> dict[str, Any]:
    """`"karras:rho=5,sigma_max=40"` -> `{"name": "karras", "options": {"rho": 5, "sigma_max": 40}}`."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    # A comma inside brackets belongs to the value: multipliers=[1,2,2].
    for item in re.split(r",(?![^\[]*\])", rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise DiffkitError(f"{shown(item)} in {shown(text)} is not an option.", "Write name:key=value,key=value.")
        options[key.strip()] = parse_value(value)
    if not name:
        raise DiffkitError(f"'{text}' names no part.", "Write name or name:key=value,key=value.")
    return {"name": name, "options": options}


def parse_value(text: str) -> Any:
    """A TOML value; anything that is none is a plain string. Raises DiffkitError for what no setting can hold."""
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a thousand brackets
        raise DiffkitError(f"The value {shown(text)} is too large.") from error


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a part: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def annotation_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type of one option. Only this annotation is evaluated: others may need what is imported for checkers only."""
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    names = getattr(function, "__globals__", {})
    hints = typing.get_type_hints(type("_", (), {"__annotations__": {"option": parameter.annotation}}), names)
    return hints["option"]


def resolve_options(
    label: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All options of a part with their types checked: given ones, then those of the same name in `context`
    (sigma_data from the data set), then defaults. Raises DiffkitError on unknown names and wrong types."""
    options = options_of(function)
    for key in given:
        if key not in options:
            known = ", ".join(options) or "none"
            raise DiffkitError(f"{label} has no option '{key}'.", f"{did_you_mean(key, options)}Its options: {known}.")
    resolved: dict[str, Any] = {}
    for key, parameter in options.items():
        if key in given:
            resolved[key] = _converted(f"{label}: {key}", annotation_of(function, parameter), given[key])
        elif context and key in context:
            resolved[key] = context[key]
        elif parameter.default is inspect.Parameter.empty:
            raise DiffkitError(f"{label} needs the option '{key}'.", f"Write {label.split()[-1]}:{key}=...")
        else:
            resolved[key] = parameter.default
    return resolved


def _converted(label: str, annotation: Any, value: Any) -> Any:
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        wanted = getattr(annotation, "__name__", str(annotation))
        reason = error.errors()[0]["msg"].lower()
        raise DiffkitError(f"{label} = {shown(value)} does not fit: {reason}.", f"It takes {wanted}.") from error


def validated(values: Mapping[str, Any], source: str = "") -> Settings:
    """Settings from plain tables. Raises DiffkitError naming the key and the nearest known one."""
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        where = f" in {source}" if source else ""
        if problem["type"] == "extra_forbidden":
            section, name = _section(problem["loc"])
            known = list(section.model_fields)
            raise DiffkitError(
                f"Unknown setting '{key}'{where}.",
                f"{did_you_mean(name, known)}Known there: {', '.join(known)}.",
            ) from error
        message = problem["msg"].replace("Input should", "should").replace("Value error, ", "")
        raise DiffkitError(f"{key} = {shown(problem['input'])}{where}: {message}.") from error


def _section(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    section: Any = Settings
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            break
        section = field.annotation
    return section, str(location[-1])


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises DiffkitError if it is missing, unreadable, too large or no TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except PermissionError as error:
        raise paths.unreadable(path, error) from error
    except OSError as error:
        raise DiffkitError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(content) > LARGEST_FILE:
        raise DiffkitError(f"{path} is larger than {LARGEST_FILE // 2**20} MiB: too large for settings.")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise DiffkitError(f"{path} is nested too deeply for settings.") from error
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise DiffkitError(f"{path} is not valid TOML: {error}.") from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key (`train.lr`) in nested tables. A part keeps its other options only if its name stays."""
    *path, last = key.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if isinstance(inner, str):
            parsed = parse_part(inner)
            inner = values[part] = {"name": parsed["name"], **parsed["options"]}
        if not isinstance(inner, dict):
            raise DiffkitError(f"'{key}' goes through '{part}', which is a value.", "Write section.key=value.")
        values = inner
    values[last] = value


def put_part(values: dict[str, Any], key: str, text: str, default: str) -> None:
    """Name a part; options that are there already stay if the name does."""
    before = values.get(key, default)
    before = PartChoice.model_validate(before if isinstance(before, str) else {"name": default, **before})
    values[key] = PartChoice.model_validate(text).over(before).table()


def set_from_text(values: dict[str, Any], assignment: str) -> None:
    """`--set train.lr=1e-3`."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise DiffkitError(f"--set {assignment!r} is no assignment.", "Write --set section.key=value.")
    put(values, key.strip(), parse_value(text))


def to_toml(settings: Settings) -> str:
    """The text of config.toml."""
    return tomli_w.dumps(to_tables(settings))


def to_tables(settings: Settings) -> dict[str, Any]:
    """Plain tables without empty values, parts as `name` with their options beside it."""

    def plain(value: Any) -> Any:
        if isinstance(value, PartChoice):
            return plain(value.table())
        if isinstance(value, BaseModel):
            return plain({name: getattr(value, name) for name in type(value).model_fields})
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value

    tables: dict[str, Any] = plain(settings)
    return tables


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two of `to_tables`: "train.lr = 0.01 (was 0.001)"."""
    found = []
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} = {shown(new)} (was {shown(old)})")
    return found
