"""A run's report: its files, its model, one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit import paths
from diffkit.compose.model import Model, load_model
from diffkit.compose.sampled import own_inputs
from diffkit.compose.wishes import Wishes, class_labels
from diffkit.config import Settings, to_toml
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from diffkit.measure.report import Records

ROWS, COLUMNS = 4, 8


def report(run: RunDir, *, trajectory: bool = True) -> str:
    """The page, from whatever the run has so far. Raises DiffkitError if this is not a run."""
    from diffkit.measure.report import Facts, page, read_records

    if not run.exists:
        raise DiffkitError(
            f"{run.path} is not a run.", "Name the folder that diffkit train wrote.", code=ExitCode.MODEL
        )
    settings, records = run.settings(), read_records(run.path)
    model = load_model(run.path, device="cpu") if paths.exists(run.model) else None
    strip, levels = _trajectory(model) if trajectory and model else (None, [])
    facts = Facts(
        name=run.path.resolve().name,
        rows=_rows(run, settings, records, model),
        config=to_toml(settings),
        epoch=(records.sessions[-1] if records.sessions else {}).get("data_images", 0),
        trajectory=strip,
        levels=levels,
    )
    return page(run.path, facts, records)


def _rows(run: RunDir, settings: Settings, records: Records, model: Model | None) -> list[tuple[str, str]]:
    last: dict[str, Any] = records.sessions[-1] if records.sessions else {}
    rows = [("data", settings.data.path)]
    if "data_images" in last:
        rows.append(("images", f"{last['data_images']:,} to train on, {last['data_holdout']:,} held out"))
    if model is not None:
        parameters = sum(p.numel() for p in model.denoiser.network.parameters())
        rows.append(("size and classes", str(model.spec)))
        rows.append(("network", f"{settings.backbone.name}, {parameters / 1e6:.1f} million parameters"))
    rows += [
        ("noise schedule", str(settings.scheduler)),
        ("prediction", str(settings.prediction)),
        ("sampling", f"{settings.sample.sampler}, {settings.sample.steps} steps on {settings.sample.scheduler}"),
        ("batch and learning rate", f"{settings.train.batch_size} images, {settings.train.lr:g}"),
    ]
    if last:
        versions = f"diffkit {last.get('diffkit')}, torch {last.get('torch')}, Python {last.get('python')}"
        rows.append(("machine", f"{last.get('device')}, {settings.train.precision}; {versions}"))
        rows.append(("begun", str(records.sessions[0].get("time", ""))))
    if records.passed_over:
        rows.append(("left out", f"{records.passed_over:,} lines of the run's records, which diffkit did not write so"))
    others = {part["distribution"]: part["version"] for part in settings.parts.values()}
    plugins = [f"{name} {version}" for name, version in others.items() if name != "diffkit"]
    return rows + ([("plugins", ", ".join(plugins))] if plugins else [])


def _trajectory(model: Model) -> tuple[npt.NDArray[np.uint8], list[float]]:
    """Some images on their way from noise, a row each, at noise levels spread over the sampler's own."""
    import numpy as np

    from diffkit.engine.pictures import grid

    columns, levels = [], []
    classes = (
        [model.spec.classes[index % len(model.spec.classes)] for index in range(ROWS)] if model.spec.classes else None
    )
    wishes = Wishes(class_labels(model.spec, classes), inputs=own_inputs(model) if model.spec.image_channels else None)
    steps = list(model.trajectory(model.plan(), ROWS, wishes))
    chosen = sorted({round(i * (len(steps) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    for number in chosen:
        level, pixels = steps[number]
        columns.append(pixels)
        levels.append(level)
    count = len(columns)
    ordered = [columns[column][row] for row in range(ROWS) for column in range(count)]
    return grid(np.stack(ordered), count), levels


def mine(path: Path) -> bool:
    """Whether this file is a report, which may be replaced."""
    from diffkit.measure.report.page import GENERATOR

    with path.open(encoding="utf-8", errors="replace") as file:
        return f'name="generator" content="{GENERATOR}"' in file.read(2000)
