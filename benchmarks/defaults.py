"""diffkit's default sampling against the peers' default, DDPM in 1,000 steps on linear betas, with one trained model.

    python benchmarks/defaults.py RUN

Kernel distance to all real images with its interval, and the seconds that sampling took. Writes results/defaults.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import publish, write

import diffkit
from diffkit.compose.comparison import Way, compare
from diffkit.compose.reference import Reference, run_through

IMAGES = 300


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/run")
    model = diffkit.load(run)
    ways = [
        Way(model, {}),
        Way(model, {}, "ancestral", "lognormal:mean=-1,std=3", 30),
        Way(model, {}, "ancestral", "linear", 1000),
    ]
    found = run_through(compare(Reference.of(model, run, None, "lite0"), "all", "kid", ways, IMAGES))
    ours, like_theirs, theirs = found
    lines = ["| sampling | network calls | seconds | distance | 95 % interval |", "|---|---|---|---|---|"]
    for each in found:
        metric = each.metric
        lines.append(
            f"| {each.settings['sampler']}, {each.settings['scheduler'].partition(':')[0]} | {each.calls} "
            f"| {each.seconds:.1f} | {metric.name} {metric.value:.4f} | {metric.low:.4f} to {metric.high:.4f} |"
        )
    ratio = theirs.seconds / ours.seconds
    same = theirs.seconds / like_theirs.seconds
    lines += [
        "",
        f"The default is {ratio:.0f} times as fast, ancestral in 30 steps {same:.0f} times ({IMAGES} images).",
    ]
    print("\n".join(lines))
    write(
        "defaults",
        {
            "images": IMAGES,
            "ratio": round(ratio, 2),
            "ratio_ancestral": round(same, 2),
            "ways": [each.to_dict() for each in found],
        },
    )
    publish("defaults.json", "benchmarks.md", "\n".join(lines))


if __name__ == "__main__":
    main()
