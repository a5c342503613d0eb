"""How much of the variance of Gaussian data each sampler keeps: exact, no Monte Carlo.

For Gaussian data a deterministic sampler multiplies its start by a number, so the output variance is that number
squared. Printed: deviation from the right variance in per cent, at 20 and 50 network calls.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from common import publish, write

from diffkit.config import SampleSettings
from diffkit.core import schedules
from diffkit.core.samplers import multistep, onestep
from diffkit.core.schedules import over_range, sampling_grid

SAMPLERS = {
    "euler": (onestep.euler, 1),
    "heun": (onestep.heun, 2),
    "dpm2": (onestep.dpm2, 2),
    "dpmpp-2s": (onestep.dpmpp_2s, 2),
    "dpmpp-2m": (multistep.dpmpp_2m, 1),
    "dpmpp-3m": (multistep.dpmpp_3m, 1),
    "unipc": (multistep.unipc, 1),
    "unipc:order=2": (partial(multistep.unipc, order=2), 1),
    "deis": (multistep.deis, 1),
    "deis:order=2": (partial(multistep.deis, order=2), 1),
    "ipndm": (multistep.ipndm, 1),
    "lms": (multistep.lms, 1),
}
GRIDS = {
    "lognormal:mean=-1,std=3": partial(schedules.lognormal, mean=-1.0, std=3.0),
    "loglinear": schedules.loglinear,
    "karras": schedules.karras,
}
SIDES = [32, 128]
CALLS = [20, 50]
DEVIATION = 0.5


def deviation(sampler: str, grid: str, calls: int, side: int) -> float:
    function, per_step = SAMPLERS[sampler]
    s_max = 80 * side / 32
    sigmas = sampling_grid(over_range(GRIDS[grid], 0.002, s_max), (calls + per_step - 1) // per_step)
    x = torch.tensor([math.sqrt(DEVIATION**2 + s_max**2)], dtype=torch.float64)
    *_, last = function(lambda x, s: DEVIATION**2 / (DEVIATION**2 + s**2) * x, x, sigmas, None)
    return 100 * (float(last) ** 2 / DEVIATION**2 - 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of docs/samplers.md: a line for each grid and sampler, the default in bold."""
    found = {(row["side"], row["grid"], row["sampler"]): row["per_cent"] for row in rows}
    default = SampleSettings()
    lines = ["| grid | sampler | 32x32: 20 calls | 50 calls | 128x128: 20 calls | 50 calls |", "|" + "---|" * 6]
    for grid in GRIDS:
        for sampler in SAMPLERS:
            figures = [f"{found[side, grid, sampler][calls]:+.1f} %" for side in SIDES for calls in CALLS]
            cells = [grid, sampler, *figures]
            if (grid, sampler) == (default.scheduler.name, str(default.sampler)):
                cells = [f"**{cell}**" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for side in SIDES:
        for grid in GRIDS:
            for sampler in SAMPLERS:
                found = {calls: round(deviation(sampler, grid, calls, side), 2) for calls in CALLS}
                rows.append({"side": side, "grid": grid, "sampler": sampler, "per_cent": found})
                print(f"{side:4} {grid:26} {sampler:9}", *(f"{value:+8.2f} %" for value in found.values()))
    publish("variance.json", "samplers.md", table(rows))
    write("variance", {"deviation": DEVIATION, "calls": CALLS, "rows": rows})


if __name__ == "__main__":
    main()
