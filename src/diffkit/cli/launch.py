"""`--gpus N`: the same command once for each GPU, under torchrun's watch."""

from __future__ import annotations

import os
import sys
import uuid
from typing import NoReturn


def launched() -> bool:
    """Whether torchrun, or `launch`, has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(count: int, device: str) -> NoReturn:
    """Run this command in `count` processes and end with their exit code. Raises DiffkitError for too many."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from diffkit.errors import DiffkitError, ExitCode

    there = torch.cuda.device_count()
    if device != "cpu" and count > there:
        raise DiffkitError(
            f"--gpus {count}: this machine has {there} that torch {torch.__version__} can use.",
            f"Choose --gpus {there}." if there else "Leave --gpus out, or add --device cpu for as many CPU processes.",
            code=ExitCode.MACHINE,
        )
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "diffkit", *_without_gpus(sys.argv[1:]))
    except ChildFailedError as error:
        sys.exit(next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1))
    except SignalException:
        sys.exit(int(ExitCode.RESUMABLE))
    sys.exit(0)


def _without_gpus(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument.startswith("--gpus")):
            kept.append(argument)
        skip = argument == "--gpus"
    return kept
