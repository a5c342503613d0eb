"""The settings of a run: completed for a new one, compared for one that goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.batch import with_batch
from diffkit.compose.model import model_path
from diffkit.compose.parts import (
    PART_KINDS,
    chosen_parts,
    completed,
    find,
    recorded,
    task_of,
    trait,
)
from diffkit.compose.trial import first_use
from diffkit.config import PartChoice, Settings, to_tables, validated
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from diffkit.engine.store import Store


SURVEYED = 1024  # images
LEAST_DIFFERENCE = 1e-3


class OtherSettings(DiffkitError):
    """A run was begun with other settings or other data."""


def new_settings(given: Mapping[str, Any], store: Store, device: torch.device, processes: int = 1) -> Settings:
    """All settings of a new run, except the precision: what was not given follows from data, devices and model."""
    settings = validated({**given, **_inherited(given)})
    spec = training_spec(settings, store.spec)
    backbone = settings.backbone
    if not settings.train.init and (settings.preset or hasattr(find("backbones", backbone).function, "presets")):
        preset = settings.preset or _default_preset(store.count, device)
        backbone = backbone.over(_preset(backbone, preset, spec))
    settings = settings.model_copy(update={"near": _is_near(settings, store)})
    sigma_data = _sigma_data(settings, store)
    scale = sigma_data / store.sigma_data
    s_max = settings.noise.s_max or 80 * math.sqrt(spec.height * spec.width) / 32 * scale
    shift = settings.noise.shift if "shift" in settings.noise.model_fields_set else scale
    if settings.noise.s_min >= s_max:
        raise DiffkitError(f"noise.s_min = {settings.noise.s_min} is not below s_max = {s_max}.")
    settings = settings.model_copy(
        update={
            "backbone": backbone,
            "preset": None,
            "noise": settings.noise.model_copy(update={"s_max": s_max, "shift": shift}),
            "data": settings.data.model_copy(update={"fingerprint": store.fingerprint}),
        }
    )
    settings = _with_parts(settings, sigma_data)
    return with_batch(settings.model_copy(update={"parts": recorded(settings)}), spec, store, device, processes)


def resumed_settings(given: Mapping[str, Any], store: Store, run: RunDir) -> Settings:
    """The run's own settings, but for the micro-batch, graphs and compilation: they alter nothing but rounding.

    Raises OtherSettings if `given` or the data contradict them.
    """
    stored = run.settings()
    if stored.data.fingerprint != store.fingerprint:
        raise OtherSettings(
            f"{run.path} was trained on other data than {store.path} holds now.",
            f"It began with {stored.data.path or 'another data set'}; choose another -o to train on this one.",
            code=ExitCode.DATA,
        )
    asked = validated(_merged(stored, given, training_spec(stored, store.spec)))
    micro = min(asked.train.micro_batch or 1, stored.train.batch_size or 1)
    changed: dict[str, Any] = {"micro_batch": micro, "cuda_graphs": asked.train.cuda_graphs}
    if asked.train.compile != "auto":
        changed["compile"] = asked.train.compile
    if asked.train.fused is not None:
        changed["fused"] = asked.train.fused
    # How it is computed changes rounding only; the layout, and what was not asked for, stay as the run has found them.
    same = {
        key: getattr(stored.train, key) for key in ("micro_batch", "compile", "channels_last", "fused", "cuda_graphs")
    }
    asked = asked.model_copy(update={"train": asked.train.model_copy(update=same)})
    known = stored.prediction.options.get("sigma_data")
    sigma_data = float(known) if isinstance(known, int | float) else _sigma_data(stored, store)
    different = _differences(to_tables(_with_parts(stored, sigma_data)), to_tables(_with_parts(asked, sigma_data)))
    if different:
        key, was, now = different[0]
        raise OtherSettings(
            f"{run.path} was begun with {key} = {was}, not {now}.",
            "Leave that out to go on with the run, or choose another place with -o.",
        )
    return stored.model_copy(update={"train": stored.train.model_copy(update=changed)})


def contradiction(given: Mapping[str, Any], store: Store, run: RunDir) -> OtherSettings | None:
    """Why the same command would not resume this run, if it would not. A damaged run raises its own error."""
    try:
        resumed_settings(given, store, run)
    except OtherSettings as error:
        return error
    return None


def training_spec(settings: Settings, stored: ImageSpec) -> ImageSpec:
    """The spec of the crops and of what the task shows.

    Raises DiffkitError if the crops are larger than what is stored, or if the task cannot be done with this set.
    """
    stored = replace(stored, image_channels=_image_channels(settings, stored))
    if settings.data.size is None:
        return stored
    height, width = settings.data.size
    if height > stored.height or width > stored.width or min(height, width) < 1:
        raise DiffkitError(
            f"Cannot crop {height}x{width} from stored images of {stored.height}x{stored.width}.",
            f"Prepare the images again with --size {height}x{width} or larger.",
        )
    return replace(stored, height=height, width=width)


def _image_channels(settings: Settings, stored: ImageSpec) -> int:
    """The channels of the conditioning image, found by making one."""
    task = task_of(settings)
    if task is None:
        return 0
    import torch

    if trait(task, "needs_pairs") and not stored.image_channels:
        raise DiffkitError(
            "This data set holds no pairs of images.",
            "Prepare it with --pairs FOLDER: the input images, under the names of those to be made.",
            code=ExitCode.DATA,
        )
    shown = torch.zeros(1, stored.image_channels or stored.channels, stored.height, stored.width)
    assert settings.task is not None
    with first_use("tasks", settings.task):
        made = task(shown, lambda count: torch.full((1, count), 0.5, dtype=torch.float64), None)
    if made.shape[2:] != shown.shape[2:]:
        raise DiffkitError(f"The task {settings.task} makes images of another size: {list(made.shape[2:])}.")
    return int(made.shape[1])


def _with_parts(settings: Settings, sigma_data: float) -> Settings:
    """Every part with all its options, names and types checked."""
    context, parts = {"sigma_data": sigma_data}, settings.parts
    update: dict[str, Any] = {
        key: completed(PART_KINDS[key], choice, context, parts.get(key))[0]
        for key, choice in chosen_parts(settings).items()
    }
    sample = settings.sample
    update["sample"] = sample.model_copy(
        update={
            "sampler": completed("samplers", sample.sampler, versions=parts.get("sampler"))[0],
            "scheduler": completed("schedules", sample.scheduler, versions=parts.get("grid"))[0],
        }
    )
    return settings.model_copy(update=update)


def _is_near(settings: Settings, store: Store) -> bool:
    """Whether the difference is learned: if the task shows nearly the image, and of the image itself, not of a pair."""
    task = task_of(settings)
    if settings.near is not None or task is None:
        return bool(settings.near and task)
    return trait(task, "near") and not store.spec.image_channels


def _sigma_data(settings: Settings, store: Store) -> float:
    """The root mean square of what is denoised: the images or, for a task that shows nearly them, the difference."""
    if not settings.near:
        return store.sigma_data
    import torch

    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.batches import Batches

    images = Batches(store, training_spec(settings, store.spec), 0, False, 0.0, task_of(settings))
    count, at_once = min(store.count, SURVEYED), max(1, 2**22 // (store.spec.height * store.spec.width))
    squares = torch.zeros((), dtype=torch.float64)
    for first in range(0, count, at_once):
        clean, condition, positions = images.batch(first, min(at_once, count - first)).to(torch.device("cpu"))
        squares += (clean - Denoiser.base(condition, clean.shape[1])).square().mean() * len(positions)
    scale = float((squares / count).sqrt())
    if scale < LEAST_DIFFERENCE:
        raise DiffkitError(
            f"The task {settings.task} shows these images as they are: there is nothing left to learn.",
            "Colours need images in colour; super-resolution needs details.",
            code=ExitCode.DATA,
        )
    return scale


def _merged(stored: Settings, given: Mapping[str, Any], spec: ImageSpec) -> dict[str, Any]:
    """The stored tables with what was given over them, key by key; a part of another name replaces the stored one."""
    tables = to_tables(stored)
    result = dict(tables)
    for key, value in given.items():
        if key in PART_KINDS:
            asked, before = getattr(validated({key: value}), key), getattr(stored, key)
            result[key] = (asked.over(before) if before else asked).table()
        else:
            result[key] = {**tables.get(key, {}), **value} if isinstance(value, Mapping) else value
    if preset := result.pop("preset", None):
        backbone = validated({"backbone": given.get("backbone", stored.backbone.name)}).backbone
        result["backbone"] = backbone.over(_preset(backbone, preset, spec)).over(stored.backbone).table()
    train = {**result["train"], "init": _init_text(result["train"].get("init", ""))}
    if train.get("precision") == "auto":
        train["precision"] = stored.train.precision
    # Where the data lie may change; what they are may not.
    return {**result, "train": train, "data": {**result["data"], "path": stored.data.path}}


def _preset(backbone: PartChoice, preset: str, spec: ImageSpec) -> PartChoice:
    """What a preset of this backbone stands for. Raises DiffkitError if the backbone has no presets."""
    presets = getattr(find("backbones", backbone).function, "presets", None)
    if presets is None:
        raise DiffkitError(f"The backbone '{backbone.name}' has no presets.", "Give its options instead.")
    return PartChoice(name=backbone.name, options=presets(preset, spec))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys([*was, *now]):
        old, new = was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append((f"{path}{key}", old, new))
    return found


def _init_text(init: str) -> str:
    """The model file that `--init` names, whether or not it is still there."""
    return init if not init or init.endswith(".safetensors") else str(Path(init) / "model.safetensors")


def _inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    """With `--init MODEL`, the network and the range of noise levels are that model's."""
    init = dict(given.get("train", {})).get("init")
    if not init:
        return {}
    from diffkit.engine.modelfile import read_model_header

    tables = read_model_header(model_path(init))["settings"]
    for key in ("backbone", "preset", "prediction"):
        if key in given:
            raise DiffkitError(
                f"--init takes the {key} from {init}: it cannot be chosen too.",
                f"Leave {key} out, or leave --init out.",
            )
    return {
        "backbone": tables["backbone"],
        "prediction": tables["prediction"],
        **({"task": given.get("task", tables["task"]), "near": tables.get("near", False)} if "task" in tables else {}),
        "noise": {**tables["noise"], **given.get("noise", {})},
        "train": {**given["train"], "init": _init_text(init)},
    }


def _default_preset(count: int, device: torch.device) -> str:
    """By device memory and data size: a small folder gains nothing from a large network."""
    from diffkit.engine.devices import memory_bytes

    if device.type == "cpu":
        return "tiny"
    return "base" if count >= 5_000 and (memory_bytes(device) or 0) >= 12 * 2**30 else "small"
