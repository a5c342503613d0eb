"""diffkit's default sampling against the peers' default, DDPM in 1,000 steps on linear betas, with one trained model.

    python benchmarks/defaults.py RUN [NAME]

Kernel distance to all real images with its interval, and the seconds that sampling took. Writes results/defaults.json:
what it finds takes its place beside what was found with models of other names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import environment, kept, publish, write

import diffkit
from diffkit.compose.comparison import Way, compare
from diffkit.compose.reference import Reference, run_through

IMAGES = 300
GRID = "lognormal:mean=-1,std=3"


def measured(run: Path) -> dict[str, Any]:
    """The ways to sample, the default first and the peers' last; and what the model is."""
    model = diffkit.load(run)
    ways = [
        Way(model, {}),
        Way(model, {}, "ancestral", GRID, 15),
        Way(model, {}, "ancestral", GRID, 30),
        Way(model, {}, "dpmpp-2m-sde", GRID, 30),
        Way(model, {}, "ancestral", "linear", 1000),
    ]
    found = run_through(compare(Reference.of(model, None, "lite0"), "all", "kid", ways, IMAGES))
    size = f"{model.spec.width}x{model.spec.height}"
    about = {"size": size, "images_seen": model.images_seen, "environment": environment()}
    return {**about, "ways": [each.to_dict() for each in found]}


def table(models: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md."""
    lines = []
    for name, about in models.items():
        theirs = about["ways"][-1]
        lines += [
            f"{name} ({about['size']}, after {about['images_seen']:,} images):",
            "",
            f"| sampling | network calls | seconds | faster by | {theirs['metric']['name']} | 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        for number, way in enumerate(about["ways"]):
            metric, says = way["metric"], " (the default)" if number == 0 else ""
            lines.append(
                f"| {way['sampler']}, {way['scheduler'].partition(':')[0]}{says} | {way['network_calls']} "
                f"| {way['seconds']:.1f} | {theirs['seconds'] / way['seconds']:.0f}x | {metric['value']:.4f} "
                f"| {metric['low']:.4f} to {metric['high']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/run")
    name = sys.argv[2] if len(sys.argv) > 2 else "the demo's digits"
    models = {**kept("defaults").get("models", {}), name: measured(run)}
    write("defaults", {"images": IMAGES, "models": models})
    publish("defaults.json", "benchmarks.md", table(models))


if __name__ == "__main__":
    main()
