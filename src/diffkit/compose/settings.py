"""The settings of a run: completed for a new one, compared for one that goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffkit.compose.model import model_path
from diffkit.compose.parts import PART_KINDS, bound, completed, dummy_inputs, find, versions
from diffkit.config import PartChoice, Settings, to_tables, validated
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from diffkit.engine.store import Store


def new_settings(given: Mapping[str, Any], store: Store, device: torch.device) -> Settings:
    """All settings of a new run, except the precision: what was not given follows from data, device and model."""
    settings = validated({**given, **_inherited(given)})
    spec = training_spec(settings, store.spec)
    backbone = settings.backbone
    if not settings.train.init and (settings.preset or hasattr(find("backbones", backbone).function, "presets")):
        preset = settings.preset or _default_preset(store.count, device)
        options = {**_preset_options(backbone, preset, spec), **backbone.options}
        backbone = PartChoice(name=backbone.name, options=options)
    settings = settings.model_copy(
        update={
            "scheduler": completed("schedules", settings.scheduler)[0],
            "prediction": completed("predictions", settings.prediction, {"sigma_data": store.sigma_data})[0],
            "backbone": completed("backbones", backbone)[0],
            "preset": None,
            "noise": settings.noise.model_copy(
                update={"s_max": settings.noise.s_max or 80 * math.sqrt(spec.height * spec.width) / 32}
            ),
            "data": settings.data.model_copy(update={"fingerprint": store.fingerprint}),
            "parts": versions(settings),
        }
    )
    if settings.noise.s_min >= (settings.noise.s_max or 0):
        raise DiffkitError(f"noise.s_min = {settings.noise.s_min} is not below s_max = {settings.noise.s_max}.")
    return _with_batch(settings, spec, store, device)


def resumed_settings(given: Mapping[str, Any], store: Store, run: RunDir) -> Settings:
    """The run's own settings. Raises DiffkitError if `given` or the data contradict them."""
    stored = run.settings()
    if stored.data.fingerprint != store.fingerprint:
        raise DiffkitError(
            f"{run.path} was trained on other data than {store.path} holds now.",
            f"It began with {stored.data.path or 'another data set'}; choose another -o to train on this one.",
            code=ExitCode.DATA,
        )
    asked = validated(_merged(stored, given, training_spec(stored, store.spec)))
    update = {key: completed(kind, getattr(asked, key), versions=stored.parts)[0] for key, kind in PART_KINDS.items()}
    different = _differences(to_tables(stored), to_tables(asked.model_copy(update=update)))
    if different:
        key, was, now = different[0]
        raise DiffkitError(
            f"{run.path} was begun with {key} = {was}, not {now}.",
            "Leave that out to go on with the run, or choose another place with -o.",
        )
    return stored


def compatible(given: Mapping[str, Any], store: Store, run: RunDir) -> bool:
    """Whether the same command would resume this run."""
    try:
        resumed_settings(given, store, run)
    except DiffkitError:
        return False
    return True


def training_spec(settings: Settings, stored: ImageSpec) -> ImageSpec:
    """The spec of the crops. Raises DiffkitError if they are larger than what is stored."""
    if settings.data.size is None:
        return stored
    height, width = settings.data.size
    if height > stored.height or width > stored.width or min(height, width) < 1:
        raise DiffkitError(
            f"Cannot crop {height}x{width} from stored images of {stored.height}x{stored.width}.",
            f"Prepare the images again with --size {height}x{width} or larger.",
        )
    return replace(stored, height=height, width=width)


def _merged(stored: Settings, given: Mapping[str, Any], spec: ImageSpec) -> dict[str, Any]:
    """The stored tables with what was given over them, key by key; a part of another name replaces the stored one."""
    tables = to_tables(stored)
    result = dict(tables)
    for key, value in given.items():
        section = tables.get(key)
        if key in PART_KINDS:
            choice = getattr(validated({key: value}), key)
            same = choice.name == tables[key]["name"]
            result[key] = {**(tables[key] if same else {}), **choice.table()}
        elif isinstance(value, Mapping):
            result[key] = {**(section or {}), **value}
        else:
            result[key] = value
    if preset := result.pop("preset", None):
        backbone = PartChoice.model_validate(given.get("backbone", stored.backbone.name))
        result["backbone"] = {**result["backbone"], **_preset_options(backbone, preset, spec), **backbone.table()}
    # Where the data lie may change; what they are may not.
    result["data"] = {**result["data"], "path": stored.data.path}
    return result


def _preset_options(backbone: PartChoice, preset: str, spec: ImageSpec) -> dict[str, Any]:
    """What a preset of this backbone stands for. Raises DiffkitError if the backbone has no presets."""
    presets = getattr(find("backbones", backbone).function, "presets", None)
    if presets is None:
        raise DiffkitError(f"The backbone '{backbone.name}' has no presets.", "Give its options instead.")
    options: dict[str, Any] = presets(preset, spec)
    return options


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys([*was, *now]):
        old, new = was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append((f"{path}{key}", old, new))
    return found


def _inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    """With `--init MODEL`, the network and the range of noise levels are that model's."""
    init = dict(given.get("train", {})).get("init")
    if not init:
        return {}
    from diffkit.engine.modelfile import read_header

    tables = read_header(model_path(init))["settings"]
    for key in ("backbone", "preset", "prediction"):
        if key in given:
            raise DiffkitError(
                f"--init takes the {key} from {init}: it cannot be chosen too.",
                f"Leave {key} out, or leave --init out.",
            )
    train = {**given["train"], "init": str(model_path(init))}
    noise = {**tables["noise"], **given.get("noise", {})}
    return {
        "backbone": tables["backbone"],
        "prediction": tables["prediction"],
        "noise": noise,
        "train": train,
    }


def _default_preset(count: int, device: torch.device) -> str:
    """By device memory and data size: a small folder gains nothing from a large network."""
    from diffkit.engine.devices import memory_bytes

    if device.type == "cpu":
        return "tiny"
    return "base" if count >= 5_000 and (memory_bytes(device) or 0) >= 12 * 2**30 else "small"


def _with_batch(settings: Settings, spec: ImageSpec, store: Store, device: torch.device) -> Settings:
    """Batch size and learning rate, unless given: from image size, data size, device memory and parameters."""
    import torch

    from diffkit.engine.devices import activation_bytes, memory_bytes

    with torch.device("meta"):
        network = bound("backbones", settings.backbone, settings.parts)(spec)
        inputs, condition = dummy_inputs(spec, 1, torch.device("meta"))
        each = activation_bytes(lambda: network(*inputs, **condition))
    parameters = sum(p.numel() for p in network.parameters())
    train = settings.train
    memory = memory_bytes(device)
    if memory is None:
        batch = min(64, max(8, 2**18 // (spec.height * spec.width)))
    else:
        fits = (0.6 * memory - 20 * parameters) / max(each, 1)
        batch = 2 ** int(math.log2(min(256, max(fits, 1))))
    batch = train.batch_size or max(1, min(batch, 2 ** int(math.log2(max(store.count, 1)))))
    lr = train.lr or float(f"{min(2e-3, max(1e-4, 2e-3 * math.sqrt(3e6 / parameters))):.1e}")
    update = {"batch_size": batch, "micro_batch": min(train.micro_batch or batch, batch), "lr": lr}
    return settings.model_copy(update={"train": train.model_copy(update=update)})
