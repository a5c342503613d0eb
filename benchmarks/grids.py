"""Which sampling grid and sampler: error against a 1,000-step reference from the same noise, on trained models.

    python benchmarks/grids.py RUN [RUN ...]

The error is the root mean square difference of the finished images, in units of [-1, 1], at equal network calls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import write

import diffkit

GRIDS = [
    "loglinear",
    "karras",
    "karras:rho=5",
    "lognormal:mean=-1,std=2",
    "lognormal:mean=-1,std=3",
    "lognormal:mean=-1,std=4",
    "lognormal:mean=-0.5,std=2",
    "cosine",
    "flow",
]
SAMPLERS = {"euler": 1, "heun": 2, "dpmpp-2m": 1}
CALLS = [10, 15, 20, 50]
IMAGES = 32


def measure(run: str) -> dict[str, Any]:
    model = diffkit.load(run)
    classes = list(model.spec.classes) or None

    def images(sampler: str, grid: str, steps: int) -> np.ndarray:
        made = model.sample(IMAGES, classes=classes, sampler=sampler, scheduler=grid, steps=steps)
        return made.astype(np.float64) / 127.5

    reference = images("dpmpp-2m", "loglinear", 1000)
    rows = []
    for grid in GRIDS:
        for sampler, per_step in SAMPLERS.items():
            errors = {}
            for calls in CALLS:
                steps = (calls + per_step - 1) // per_step
                errors[calls] = round(float(np.sqrt(np.square(images(sampler, grid, steps) - reference).mean())), 4)
            rows.append({"grid": grid, "sampler": sampler, "error": errors})
            print(f"{grid:28} {sampler:9}", *(f"{error:.4f}" for error in errors.values()), flush=True)
    return {"spec": model.spec.to_dict(), "images_seen": model.images_seen, "calls": CALLS, "rows": rows}


def main() -> None:
    for run in sys.argv[1:] or ["demo/run"]:
        print(f"{run}: error at {CALLS} network calls")
        write("grids", {"run": Path(run).name, **measure(run)})


if __name__ == "__main__":
    main()
