"""Quality against cost: which ways of sampling are worth their network calls, as a table and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffkit.measure.estimate import Estimate


@dataclass(frozen=True)
class Candidate:
    """One way of making images, and what came of it: `calls` network calls an image, `seconds` in all.

    `settings` are what makes it differ from the others (run, sampler, scheduler, steps, guidance, ema). `clipped`: the
    share of values that are black or white; `burnt`: far more of them than the real images have.
    """

    settings: dict[str, Any]
    calls: int
    seconds: float
    images: int
    metric: Estimate
    clipped: float = 0.0
    burnt: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        figures = {"network_calls": self.calls, "seconds": round(self.seconds, 3), "images": self.images}
        figures |= {"clipped": round(self.clipped, 4), "burnt": self.burnt}
        return {**self.settings, **figures, "metric": self.metric.to_dict()}


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both calls and distance, by rising calls (Pareto)."""
    result: list[Candidate] = []
    for each in sorted(candidates, key=lambda candidate: (candidate.calls, candidate.metric.value)):
        if not result or each.metric.value < result[-1].metric.value:
            result.append(each)
    return result


def choice(candidates: Sequence[Candidate]) -> Candidate:
    """The fewest calls on the front that are as good as the best within the best one's interval.

    Burnt images are never chosen where there are others: a distance between features of a model that has learnt little
    can prefer them, an eye never does.
    """
    candidates = [each for each in candidates if not each.burnt] or candidates
    best = min(candidates, key=lambda candidate: candidate.metric.value)
    bound = best.metric.value if best.metric.high is None else best.metric.high
    return next(each for each in front(candidates) if each.metric.value <= bound)


def burnt(made: float, real: float) -> bool:
    """Whether this share of black and white values is beyond what the real images' share explains."""
    return made > 2 * real + 0.05


def plot(
    candidates: Sequence[Candidate], labels: Sequence[str], chosen: Sequence[Candidate], floor: Estimate | None
) -> bytes:
    """PNG: the distance with its interval over network calls, a line for each label; the floor is real against real."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label in dict.fromkeys(labels):
        line = sorted((c for c, each in zip(candidates, labels, strict=True) if each == label), key=lambda c: c.calls)
        values = [each.metric.value for each in line]
        bounds = [(each.metric.low, each.metric.high) for each in line]
        errors = [[v - (b[0] if b[0] is not None else v) for v, b in zip(values, bounds, strict=True)]]
        errors += [[(b[1] if b[1] is not None else v) - v for v, b in zip(values, bounds, strict=True)]]
        axes.errorbar([c.calls for c in line], values, yerr=errors, marker="o", ms=4, lw=1.5, capsize=3, label=label)
    if floor is not None:
        axes.axhline(floor.value, color="0.5", ls="--", lw=1, label="real against real")
    calls = [each.calls for each in chosen]
    axes.plot(
        calls,
        [each.metric.value for each in chosen],
        ls="none",
        marker="o",
        ms=13,
        mfc="none",
        mec="0.2",
        mew=1.5,
        label="the fewest calls as good as the best",
    )
    axes.set_xscale("log")
    ticks: list[int] = []
    for tick in sorted({each.calls for each in candidates}):
        if not ticks or tick >= 1.2 * ticks[-1]:  # nearer together the numbers would overlap
            ticks.append(tick)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network calls for an image")
    axes.set_ylabel(f"{candidates[0].metric.name} (lower is better)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
