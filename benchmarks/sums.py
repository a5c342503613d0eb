"""Ways to sum the gradients of two processes, on two CPU cores: a step of each in turn, in the same two processes.

    python benchmarks/sums.py

One thread each, 32 images of 32x32 for each process. Speed is in shares of that of steps in which nothing is summed:
`after` the backward pass, `during` it (`diffkit.engine.sums`, as a training does), or by torch's
DistributedDataParallel. Writes results/sums.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from common import spread, write

ROUNDS, STEPS, BATCH = 5, 8, 32
NETWORK = {"width": 64, "multipliers": (1, 2), "blocks": 1, "attention": 0, "patch": 2}


def measure() -> None:
    """In each of the two processes; the first prints the rounds' seconds for a step, by way."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from diffkit.backbones.unet import unet
    from diffkit.engine.distributed import joined
    from diffkit.engine.sums import GradientSums
    from diffkit.interfaces import ImageSpec

    network = unet(ImageSpec(3, 32, 32), **NETWORK).train()  # type: ignore[arg-type]
    parameters = list(network.parameters())
    x, noise_level, beside = torch.randn(BATCH, 3, 32, 32), torch.zeros(BATCH), [torch.zeros(17)]

    def backward(model: torch.nn.Module) -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, noise_level)
        (found - x).square().mean().backward()

    with joined("cpu") as world, GradientSums(parameters, world) as sums:

        def during() -> None:
            with sums.last_pass():
                backward(network)
            sums.finish(beside)

        def after() -> None:
            backward(network)
            sums.finish(beside)

        during()
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
        ways: dict[str, Callable[[], None]] = {
            "nothing": lambda: backward(network),
            "after": after,
            "during": during,
            "ddp": lambda: backward(wrapped),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS + 1):
            for name, step in ways.items():
                world.wait()
                start = time.perf_counter()
                for _ in range(STEPS if number else 2):
                    step()
                if number:
                    found[name].append((time.perf_counter() - start) / STEPS)
        if world.leads:
            numbers = sum(parameter.numel() for parameter in parameters)
            print(json.dumps({"seconds": found, "parameters": numbers}))


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    begun = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank"],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in begun]
    assert not any(process.returncode for process in begun)
    record = json.loads(said[0])
    nothing = record["seconds"].pop("nothing")
    shares = {
        name: spread([fastest / own for fastest, own in zip(nothing, seconds, strict=True)])
        for name, seconds in record["seconds"].items()
    }
    write("sums", {"share": shares, "seconds": statistics.median(nothing), "parameters": record["parameters"]})
    print(json.dumps(shares))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    measure() if parser.parse_args().rank else main()
