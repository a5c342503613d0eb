"""What the host does in a step beside the passes through the network: a GPU that is faster waits for it.

    python benchmarks/host_time.py [--rounds 7] [--before COMMIT]

A training of as many tensors as the base preset has, all of them small, whose passes are left out: the gradients are
there. What is left of a step is the mode of the network, the lists of its tensors, clipping, AdamW, the average and the
account of the loss. On a CPU each of these runs tensor by tensor, on a GPU in a few kernels for all, so that there it
takes less. Processor time of the training's thread, so that other work counts little. With another commit, in turns,
each round in a process of its own. Writes results/host_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import sources, spread, write

WARM_UP, STEPS = 20, 200
ROUND = f"""
import contextlib, json, statistics, time
import torch
from diffkit.backbones.presets import unet_preset
from diffkit.backbones.unet import unet
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import v
from diffkit.core.schedules import cosine, over_range
from diffkit.engine import train as module
from diffkit.engine.batches import Batch
from diffkit.engine.gradients import SHARES, Gradients
from diffkit.engine.train import Recipe, State, train
from diffkit.interfaces import ImageSpec

class Turn:
    take = staticmethod(lambda: None)

spec = ImageSpec(3, 128, 128)
network = unet(spec, **{{**unet_preset("base", spec), "width": 8}})
recipe = Recipe(8, 8, 1e-4, 1000, (0.9, 0.99), 0.0, 1.0, 1000.0, 0)
state = State(network, recipe)
gradients = [torch.full_like(parameter, 1e-3) for parameter in network.parameters()]
found = torch.tensor(1.0), torch.ones(2, SHARES)

def passes(self, batches):
    self.optimizer.forget_gradients()
    for parameter, gradient in zip(self.optimizer.parameters, gradients):
        parameter.grad = gradient
    return found

class Batches:
    def batch(self, first, count, pinned):
        places = torch.zeros(count, 4, dtype=torch.int64)
        return Batch(torch.arange(first, first + count), None, {{}}, places, (8, 8), {{}})

Gradients._launched = passes
module.turns = lambda *_: contextlib.nullcontext(Turn())
steps = train(state, Denoiser(network, v), Batches(), over_range(cosine, 0.002, 80.0), squared_error, recipe,
              report_every=50, cuda_graphs=False)
times = []
for _ in range({WARM_UP + STEPS}):
    start = time.thread_time()
    next(steps)
    times.append(1000 * (time.thread_time() - start))
print(json.dumps({{"tensors": len(gradients), "milliseconds": statistics.median(times[{WARM_UP}:])}}))
"""


def one_round(source: Path) -> dict[str, Any]:
    """The median of some steps, by the code in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ROUND], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", help="another commit, to compare with")
    options = parser.parse_args()
    with sources(options.before) as folders:
        found: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(options.rounds):
            for name, source in folders.items():
                figures = one_round(source)
                found[name].append(figures["milliseconds"])
            print({name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    results = {name: spread(values) for name, values in found.items()}
    print(json.dumps(results))
    write(
        "host_time",
        {"tensors": figures["tensors"], "commit_before": options.before, "milliseconds_of_a_step": results},
    )


if __name__ == "__main__":
    main()
