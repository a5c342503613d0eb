"""Every sampler on a trained model: error at equal network calls, and for the best the Frechet distance.

    python benchmarks/samplers.py RUN

Error: the root mean square difference of 64 finished images, in units of [-1, 1], from what 1,000 steps make of that
noise: of heun's for samplers of the ODE, of its own along the same Brownian path for one that adds noise. Each sampler
is tried on three grids and given the best one at each number of calls. Writes results/samplers.json, the tables of
docs/samplers.md between their marks, and its plot.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import DOCS, kept, write
from common import publish as put

import diffkit
from diffkit.compose.wishes import Wishes, class_labels
from diffkit.config import SampleSettings

DEFAULT, DEFAULT_GRID = str(SampleSettings().sampler), SampleSettings().scheduler.name
SAMPLERS = {
    "dpmpp-2m": 1,
    "dpmpp-3m": 1,
    "dpmpp-3m:corrected=true": 1,
    "unipc:order=2": 1,
    "unipc": 1,
    "deis:order=2": 1,
    "deis": 1,
    "ipndm": 1,
    "ipndm:order=2": 1,
    "lms": 1,
    "lms:order=2": 1,
    "euler": 1,
    "heun": 2,
    "dpm2": 2,
    "dpmpp-2s": 2,
    "dpmpp-2m-sde": 1,
    "dpmpp-3m-sde": 1,
    "ancestral": 1,
    "edm-stochastic:churn=10": 2,
}
ADDS_NOISE = {"dpmpp-2m-sde", "dpmpp-3m-sde", "ancestral", "edm-stochastic:churn=10"}
GRIDS = ["lognormal:mean=-1,std=3", "karras", "loglinear"]
CALLS = [5, 10, 15, 20, 50]
ADAPTIVE = [0.1, 0.03, 0.01]
IMAGES, MEASURED, BEST = 64, 1000, 5


class Measured:
    """A model, and what is remembered of it."""

    def __init__(self, run: str) -> None:
        self.run = Path(run)
        self.model = diffkit.load(run)
        names = list(self.model.spec.classes) or None
        self.wishes = Wishes(class_labels(self.model.spec, names))

    def images(self, sampler: str, grid: str, steps: int) -> tuple[np.ndarray, int]:
        """Finished images, and the network calls that each took."""
        plan = self.model.plan(sampler=sampler, scheduler=grid, steps=steps)
        (batch,) = self.model.generate(plan, range(IMAGES), self.wishes, batch_size=IMAGES)
        return batch.pixels.astype(np.float64) / 127.5, batch.calls

    def errors(self) -> list[dict[str, Any]]:
        """A row for each sampler: at each number of calls the least error, and the grid that it came from."""
        ode, _ = self.images("heun", "loglinear", 1000)
        rows = []
        for sampler, per_step in SAMPLERS.items():
            truth = self.images(sampler, "loglinear", 1000)[0] if sampler in ADDS_NOISE else ode
            found: dict[int, dict[str, float]] = {}
            for calls in CALLS:
                steps = calls if per_step == 1 else (calls + 1) // 2
                found[calls] = {grid: off(self.images(sampler, grid, steps)[0], truth) for grid in GRIDS}
            rows.append({"sampler": sampler, "adds_noise": sampler in ADDS_NOISE, "error": found})
            print(f"{sampler:28}", *(f"{min(each.values()):.4f}" for each in found.values()), flush=True)
        return rows

    def adaptive(self) -> list[dict[str, Any]]:
        """Its error at some tolerances, landing only at the lowest level."""
        ode, _ = self.images("heun", "loglinear", 1000)
        rows = []
        for tolerance in ADAPTIVE:
            made, calls = self.images(f"adaptive:tolerance={tolerance}", "loglinear", 2)
            rows.append({"tolerance": tolerance, "calls": calls, "error": off(made, ode)})
            print(f"adaptive {tolerance}: {calls} calls, {rows[-1]['error']:.4f}", flush=True)
        return rows

    def distances(self, chosen: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The Frechet distance of each (sampler, grid) as `diffkit compare` measures it; and of real against real."""
        from diffkit.compose.comparison import Way, compare, real_against_real
        from diffkit.compose.reference import Reference, run_through

        reference = Reference.of(self.model, None, "lite0")
        ways = [
            Way(self.model, {}, sampler, grid, calls if SAMPLERS[sampler] == 1 else (calls + 1) // 2)
            for sampler, grid in chosen
            for calls in CALLS
        ]
        found = run_through(compare(reference, "all", "frechet", ways, MEASURED))
        floor = real_against_real(reference, "all", "frechet", MEASURED)
        assert floor is not None
        return [each.to_dict() for each in found], floor.to_dict()


def off(made: np.ndarray, truth: np.ndarray) -> float:
    return round(float(np.sqrt(np.square(made - truth).mean())), 4)


def best_grid(row: dict[str, Any]) -> str:
    """The grid with the least error at 10 to 20 calls, as a geometric mean."""
    return min(GRIDS, key=lambda grid: float(np.prod([row["error"][calls][grid] for calls in (10, 15, 20)])))


def table(results: dict[str, Any]) -> str:
    """The rows of docs/samplers.md."""
    calls = [str(each) for each in CALLS]
    lines = [
        "| sampler | grid | " + " | ".join(f"{each} calls" for each in calls) + " |",
        "|" + "---|" * (2 + len(calls)),
    ]
    for row in results["errors"]:
        grid = best_grid({"error": {int(each): value for each, value in row["error"].items()}})
        figures = [f"{row['error'][each][grid]:.3f}" for each in calls]
        name = f"`{row['sampler']}`" + (" (noise)" if row["adds_noise"] else "")
        lines.append(f"| {name} | {grid} | " + " | ".join(figures) + " |")
    lines += [""]
    for row in results["adaptive"]:
        lines.append(f"`adaptive:tolerance={row['tolerance']}`: {row['calls']} calls, error {row['error']:.3f}.")
    lines += [
        "",
        "| sampler | grid | " + " | ".join(f"{each} calls" for each in calls) + " |",
        "|" + "---|" * (2 + len(calls)),
    ]
    for start in range(0, len(results["distances"]), len(CALLS)):
        rows = results["distances"][start : start + len(CALLS)]
        figures = [f"{row['metric']['value']:.1f}" for row in rows]
        lines.append(f"| `{rows[0]['sampler']}` | {rows[0]['scheduler']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    """docs/images/samplers.png: error over calls, and distance over calls."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set_prop_cycle(color=[matplotlib.colormaps["tab20"](number) for number in range(20)])
    for row in results["errors"]:
        grid = best_grid({"error": {int(each): value for each, value in row["error"].items()}})
        values = [row["error"][str(calls)][grid] for calls in CALLS]
        style = "--" if row["adds_noise"] else ":" if SAMPLERS[row["sampler"]] == 2 else "-"
        default = row["sampler"] == DEFAULT
        left.plot(CALLS, values, style, marker="o", ms=3, lw=2.6 if default else 1.1, label=row["sampler"])
    left.set(
        xscale="log",
        yscale="log",
        ylabel="error against 1,000 steps",
        title="Error (-- adds noise, : two calls a step)",
    )
    for start in range(0, len(results["distances"]), len(CALLS)):
        rows = results["distances"][start : start + len(CALLS)]
        name = f"{rows[0]['sampler']}, {rows[0]['scheduler'].partition(':')[0]}"
        right.plot(
            [row["network_calls"] for row in rows],
            [row["metric"]["value"] for row in rows],
            marker="o",
            ms=4,
            lw=2.6 if name.split(":")[0] == DEFAULT and name.endswith(DEFAULT_GRID) else 1.1,
            label=name,
        )
    right.axhline(results["floor"]["value"], color="0.5", ls="--", lw=1, label="real against real")
    right.set(xscale="log", yscale="log", ylabel=results["distances"][0]["metric"]["name"])
    right.set_title(f"Distance of {results['images_measured']:,} images to real ones")
    right.set_yticks([10, 20, 30, 40, 60, 80, 120], ["10", "20", "30", "40", "60", "80", "120"])
    for axes in (left, right):
        axes.set_xticks(CALLS, [str(each) for each in CALLS])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("network calls")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "images" / "samplers.png")


def publish() -> None:
    """The tables and the plot, from the JSON."""
    results = kept("samplers")
    put("samplers.json", "samplers.md", table(results))
    plot(results)


def main() -> None:
    run = sys.argv[1] if len(sys.argv) > 1 else "demo/run"
    measured = Measured(run)
    errors, adaptive = measured.errors(), measured.adaptive()
    steady = [row for row in errors if not row["adds_noise"]]

    def merit(row: dict[str, Any]) -> float:
        return float(np.prod([row["error"][calls][best_grid(row)] for calls in (10, 15, 20)]))

    chosen = [(row["sampler"], best_grid(row)) for row in sorted(steady, key=merit)[:BEST]]
    if DEFAULT not in [sampler for sampler, _ in chosen]:
        chosen.append((DEFAULT, GRIDS[0]))
    distances, floor = measured.distances(chosen)
    write(
        "samplers",
        {
            "spec": measured.model.spec.to_dict(),
            "images_seen": measured.model.images_seen,
            "images": IMAGES,
            "images_measured": MEASURED,
            "errors": errors,
            "adaptive": adaptive,
            "distances": distances,
            "floor": floor,
        },
    )
    publish()


if __name__ == "__main__":
    main()
