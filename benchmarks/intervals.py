"""How often the 95 % intervals of the distances cover the truth, over 400 repeated draws from known distributions.

Gaussians, whose Frechet distance and whose kernel distance (from the moments of x.y) have closed forms.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from common import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from diffkit.measure.frechet import frechet, frechet_interval
from diffkit.measure.kernel import kernel_distance
from test_measure import gaussians, true_frechet, true_kernel

DRAWS = 400
CASES = [  # dimensions, images of each, shift of the mean, stretch of the covariance
    (8, 80, 80, 1.0, 1.3),
    (16, 100, 100, 1.0, 1.3),
    (16, 400, 200, 0.3, 1.1),
    (32, 160, 160, 0.5, 1.2),
    (32, 640, 640, 0.2, 1.0),
    (64, 400, 400, 0.3, 1.1),
    (16, 200, 200, 0.0, 1.0),
]


def main() -> None:
    rows = []
    for dimensions, n, m, shift, stretch in CASES:
        a, b = gaussians(dimensions, shift, stretch)
        truths = {"frechet": true_frechet(a, b), "kernel": true_kernel(a, b)}
        generator = torch.Generator().manual_seed(7)
        found: dict[str, list[tuple[float, bool]]] = {name: [] for name in truths}
        raw = []
        for _ in range(DRAWS):
            x, y = a.draw(n, generator), b.draw(m, generator)
            *_, corrected = frechet_interval("", x, y)
            raw.append(frechet(x, y))
            for name, each in (("frechet", corrected), ("kernel", kernel_distance("", x, y))):
                found[name].append((each.value, each.low <= truths[name] <= each.high))
        row = {"dimensions": dimensions, "n": n, "m": m, "shift": shift, "stretch": stretch}
        for name, truth in truths.items():
            values = [value for value, _ in found[name]]
            row[name] = {
                "truth": round(truth, 6),
                "mean": round(statistics.fmean(values), 6),
                "deviation": round(statistics.stdev(values), 6),
                "covered": sum(inside for _, inside in found[name]) / DRAWS,
            }
        row["frechet"]["uncorrected_mean"] = round(statistics.fmean(raw), 6)
        print(row, flush=True)
        rows.append(row)
    write("intervals", {"draws": DRAWS, "cases": rows})


if __name__ == "__main__":
    main()
