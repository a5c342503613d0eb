"""Charts as SVG, in colours that suit a light page and a dark one."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffkit.measure.report.records import Records

INK = "#010203"  # replaced by the page's own text colour
BLUE, ORANGE, GREEN, RED, GRAY = "#3b82f6", "#f08c2e", "#22a06b", "#e5484d", "#8b8b8b"
CHANNELS = {1: (GRAY,), 3: (RED, GREEN, BLUE)}
SMOOTHING = 25

_numbers = itertools.count(1)


def charts(records: Records) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG) for everything that there is something to show of."""
    made = [
        ("Loss", _loss_words(records), _loss(records)),
        ("Held-out loss", "the averaged network on fixed images under fixed noise", _held_out(records)),
        ("Gap", "how much worse held-out images fare than training images: what is memorized", _gap(records)),
        ("Held-out loss by noise level", "from little noise (dark) to much (light)", _levels(records)),
        ("Training loss by noise level", "in eight equal shares, from little noise (dark) to much", _shares(records)),
        *_metrics(records),
        ("Colours of the samples", _colour_words(records), _colours(records)),
        ("Throughput", "images a second while training", _speed(records)),
    ]
    return [(title, words, svg) for title, words, svg in made if svg]


def _loss_words(records: Records) -> str:
    count = len(records.non_finite)
    return "of the training batches, and its running mean" + (f"; crosses: not finite, {count} times" if count else "")


def _loss(records: Records) -> str:
    images, loss = records.steps["images"], records.steps["loss"]
    if len(images) < 2:
        return ""
    figure, axes = _axes()
    axes.plot(images, loss, color=BLUE, alpha=0.3, lw=0.8)
    width = max(1, min(SMOOTHING, len(loss) // 4))
    kernel = np.ones(width) / width
    mean = np.convolve(loss, kernel, "valid")
    axes.plot(images[width // 2 :][: len(mean)], mean, color=BLUE, lw=1.8)
    low, high = np.quantile(loss, [0, 0.98])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-9)
    _crosses(axes, [each["images"] for each in records.non_finite])
    return _svg(figure)


def _held_out(records: Records) -> str:
    found = records.validations
    if not found:
        return ""
    figure, axes = _axes()
    images = [each["images"] for each in found]
    axes.plot(
        images, [each["training_loss"] for each in found], color=BLUE, lw=1.8, marker=_dot(found), label="training"
    )
    axes.plot(
        images, [each["holdout_loss"] for each in found], color=ORANGE, lw=1.8, marker=_dot(found), label="held out"
    )
    best = records.best
    assert best is not None
    axes.plot(best["images"], best["holdout_loss"], "o", color=ORANGE, ms=8, mfc="none", mew=1.8, label="best")
    _legend(axes)
    return _svg(figure)


def _gap(records: Records) -> str:
    found = records.validations
    if not found:
        return ""
    figure, axes = _axes()
    gaps = [100 * (each["holdout_loss"] / each["training_loss"] - 1) for each in found]
    axes.axhline(0, color=GRAY, lw=0.8)
    axes.plot([each["images"] for each in found], gaps, color=ORANGE, lw=1.8, marker=_dot(found))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return _svg(figure)


def _levels(records: Records) -> str:
    from matplotlib import colormaps

    found = records.validations
    if not found:
        return ""
    figure, axes = _axes()
    levels = found[-1]["levels"]
    for number, level in enumerate(levels):
        colour = colormaps["plasma"](0.25 + 0.65 * number / max(len(levels) - 1, 1))
        values = [each["holdout_by_level"][number] for each in found]
        axes.plot([each["images"] for each in found], values, color=colour, lw=1.5, label=f"s = {level:.2g}")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes, columns=2)
    return _svg(figure)


def _shares(records: Records) -> str:
    from matplotlib import colormaps

    images, found = records.steps["images"], records.by_level
    if len(images) < 2 or not np.isfinite(found).any():
        return ""
    figure, axes = _axes()
    width = max(1, min(SMOOTHING, len(images) // 4))
    for number, values in enumerate(found.T):
        known = np.isfinite(values)
        if known.sum() < width:
            continue
        smooth = np.convolve(values[known], np.ones(width) / width, mode="valid")
        colour = colormaps["plasma"](0.25 + 0.65 * number / (found.shape[1] - 1))
        axes.plot(images[known][width - 1 :], smooth, color=colour, lw=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return _svg(figure)


def _metrics(records: Records) -> list[tuple[str, str, str]]:
    """A chart for each distance that was measured, with intervals and what real images get."""
    names = dict.fromkeys(
        each["name"]
        for record in records.evaluations
        for each in record.get("metrics", [])
        if each["name"] not in {"precision", "recall", "density", "coverage"}
    )
    made = [(name, "with its 95 % interval; dashed: real against real", _metric(records, name)) for name in names]
    return [*made, ("Precision and recall", "with their 95 % intervals", _fidelity(records))]


def _metric(records: Records, name: str) -> str:
    figure, axes = _axes()
    points = _points(records, name, "metrics")
    _errorbars(axes, points, ORANGE, "")
    floor = _points(records, name, "floor")
    if floor:
        axes.axhline(floor[-1][1]["value"], color=GRAY, ls="--", lw=1)
    return _svg(figure)


def _fidelity(records: Records) -> str:
    figure, axes = _axes()
    chosen = {name: _points(records, name, "metrics") for name in ("precision", "recall")}
    if not any(chosen.values()):
        return ""
    for (name, points), colour in zip(chosen.items(), (BLUE, ORANGE), strict=True):
        _errorbars(axes, points, colour, name)
    axes.set_ylim(0, 1.03)
    _legend(axes)
    return _svg(figure)


def _points(records: Records, name: str, key: str) -> list[tuple[int, dict[str, Any]]]:
    return [
        (int(record["images_seen"]), each)
        for record in records.evaluations
        for each in record.get(key, [])
        if each["name"] == name
    ]


def _errorbars(axes: Any, points: Sequence[tuple[int, dict[str, Any]]], colour: str, label: str) -> None:
    values = [each["value"] for _, each in points]
    bounds = [(each["low"], each["high"]) for _, each in points]
    errors = np.array(
        [[0 if a is None else v - a, 0 if b is None else b - v] for v, (a, b) in zip(values, bounds, strict=True)]
    )
    images = [seen for seen, _ in points]
    axes.errorbar(images, values, yerr=errors.T, color=colour, marker="o", ms=5, ls="none", capsize=3, label=label)


def _colour_words(records: Records) -> str:
    wrong = [each for each in records.previews if each.get("problems")]
    words = "mean and deviation per channel; dashed and dash-dotted: those of the data"
    if not wrong:
        return words
    return f"{words}; crosses: samples that look wrong, the last at {wrong[-1]['images']:,} images: " + " ".join(
        wrong[-1]["problems"]
    )


def _colours(records: Records) -> str:
    found = [each for each in records.previews if each.get("colour_mean")]
    if not found:
        return ""
    figure, axes = _axes()
    data: dict[str, Any] = records.sessions[-1] if records.sessions else {}
    images = [each["images"] for each in found]
    for key, style in (("mean", "-"), ("std", ":")):
        for channel, colour in enumerate(CHANNELS.get(len(found[0]["colour_mean"]), (GRAY,) * 99)):
            values = [each[f"colour_{key}"][channel] for each in found]
            label = key.replace("std", "deviation") if channel == 0 else None
            axes.plot(images, values, color=colour, ls=style, lw=1.6, marker=_dot(found), label=label)
            if data.get(f"data_{key}"):
                dashes = "--" if key == "mean" else "-."
                axes.axhline(data[f"data_{key}"][channel], color=colour, ls=dashes, lw=0.9, alpha=0.8)
    _crosses(axes, [each["images"] for each in found if each.get("problems")])
    _legend(axes)
    return _svg(figure)


def _speed(records: Records) -> str:
    images, speed = records.steps["images"], records.steps["images_per_second"]
    if len(images) < 2:
        return ""
    figure, axes = _axes()
    axes.plot(images, speed, color=GREEN, lw=1.2)
    axes.set_ylim(0, 1.15 * float(np.quantile(speed, 0.99)) or 1)
    return _svg(figure)


def _axes() -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)
    with rc_context({**style, "font.size": 9}):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_alpha(0.4)
    axes.grid(alpha=0.18, lw=0.6, color=INK)
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.set_xlabel("images seen", fontsize=8, color=INK)
    return figure, axes


def _legend(axes: Any, columns: int = 1) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=columns, labelcolor=INK)


def _crosses(axes: Any, images: Sequence[int]) -> None:
    """Along the upper edge, where something went wrong."""
    if images:
        axes.plot(images, [0.97] * len(images), "x", color=RED, ms=6, mew=1.6, transform=axes.get_xaxis_transform())


def _dot(found: Sequence[Any]) -> str | None:
    """Marks where there are too few points for a line."""
    return "o" if len(found) < 4 else None


def _count(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:g}"


def _svg(figure: Any) -> str:
    """The drawing alone, its names made its own, in the page's font and ink."""
    from matplotlib import rc_context

    if not all(math.isfinite(bound) for axes in figure.axes for bound in axes.dataLim.extents):
        return ""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffkit"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    mark = f"c{next(_numbers)}-"
    drawing = re.sub(r'id="', f'id="{mark}', drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", drawing)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'\s*xmlns(:xlink)?="[^"]*"', "", drawing)
    drawing = drawing.replace("xlink:href", "href")
    drawing = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", drawing)
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', drawing, count=1)
