"""The page itself: facts, charts and pictures into one template."""

from __future__ import annotations

import base64
import io
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkit.measure.report.charts import charts
from diffkit.measure.report.records import Records
from diffkit.names import command

FRAMES = 40
QUALITY = 88
GENERATOR = "diffkit report"


@dataclass(frozen=True)
class Facts:
    """What the page says of the run that its records do not: `rows` of (what, value), config.toml, the trajectory.

    `trajectory`: uint8 [H, W, C], or None; `steps`: the noise levels of its columns.
    """

    name: str
    rows: list[tuple[str, str]]
    config: str
    epoch: int = 0
    trajectory: npt.NDArray[np.uint8] | None = None
    levels: list[float] = field(default_factory=list)


def page(run: Path, facts: Facts, records: Records) -> str:
    """HTML that loads nothing from anywhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffkit.measure.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["figure"] = _figure
    frames = _frames(run, records)
    whole = [each for each in records.evaluations if each.get("copying")]
    latest = next(iter(reversed(whole or records.evaluations)), None)
    return environment.get_template("page.html.j2").render(
        generator=GENERATOR,
        made=time.strftime("%Y-%m-%d %H:%M"),
        facts=facts,
        records=records,
        tiles=_tiles(facts, records, latest),
        charts=charts(records),
        frames=frames,
        left_out=len(records.previews) - len(frames),
        trajectory=None if facts.trajectory is None else _data_uri(facts.trajectory),
        evaluations=records.evaluations,
        nearest=_nearest(run, latest),
        copying=latest.get("copying") if latest else None,
        commands=_commands(run, records),
    )


def _tiles(facts: Facts, records: Records, latest: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(label, value, beneath it): the figures one looks for first."""
    seen = records.images_seen
    tiles = [("images seen", f"{seen:,}", f"{seen / facts.epoch:,.0f} epochs" if facts.epoch else "")]
    if len(loss := records.steps["loss"]):
        tiles.append(("training loss", f"{loss[-max(1, len(loss) // 20) :].mean():.4f}", "mean of the latest steps"))
    if best := records.best:
        tiles.append(("held-out loss", f"{best['holdout_loss']:.4f}", f"best, at {best['images']:,} images"))
    for each in (latest or {}).get("metrics", [])[:2]:
        between = "" if each["low"] is None else f"{_figure(each['low'])} to {_figure(each['high'])}"
        tiles.append((each["name"], _figure(each["value"]), between or each["note"]))
    if latest and latest.get("copying"):
        rate = latest["copying"]["rate"]
        tiles.append(("copies", f"{rate['value']:.1%}", f"{rate['low']:.1%} to {rate['high']:.1%}"))
    if len(speed := records.steps["images_per_second"]):
        tiles.append(("throughput", f"{np.median(speed):,.0f}", "images a second"))
    return tiles


def _frames(run: Path, records: Records) -> list[dict[str, Any]]:
    """The previews, at most 40 of them, the first and the last among them."""
    there = [each for each in records.previews if (run / each["picture"]).exists()]
    if len(there) > FRAMES:
        there = [there[round(i * (len(there) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    return [{"images": each["images"], "uri": _file_uri(run / each["picture"])} for each in there]


def _nearest(run: Path, latest: dict[str, Any] | None) -> str | None:
    path = run / latest["nearest"] if latest and latest.get("nearest") else None
    return _file_uri(path) if path is not None and path.exists() else None


def _commands(run: Path, records: Records) -> list[tuple[str, str]]:
    """(what it does, command)."""
    made = [
        ("train" if number == 0 else "go on", shlex.join(each["command"]))
        for number, each in enumerate(records.sessions)
        if each.get("command")
    ]
    return [*made, ("make images", command("sample", run)), ("measure them", command("evaluate", run))]


def _file_uri(path: Path) -> str:
    with Image.open(path) as image:
        return _data_uri(np.asarray(image.convert("RGB")))


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, format="WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
