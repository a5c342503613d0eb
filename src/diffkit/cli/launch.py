"""`--gpus N`: the same command once for each GPU, under torchrun's watch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

EXIT = "DIFFKIT_EXIT_FILE"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
WEEK = 7 * 86_400
"""Seconds that a launcher which was asked to stop waits for its processes: they save first, and end by themselves."""


def launched() -> bool:
    """Whether torchrun, or `launch`, has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(count: int, device: str) -> NoReturn:
    """Run this command in `count` processes and end with their exit code. Raises DiffkitError for too many."""
    import tempfile
    import uuid

    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from diffkit.errors import DiffkitError, ExitCode

    if device not in {"auto", "cuda", "cpu"}:
        raise DiffkitError(f"--gpus {count} gives each process a device of its own.", f"Leave --device {device} out.")
    there = torch.cuda.device_count()
    if device != "cpu" and count > there:
        raise DiffkitError(
            f"--gpus {count}: this machine has {there} that torch {torch.__version__} can use.",
            f"Choose --gpus {there}." if there else "Leave --gpus out, or add --device cpu for as many CPU processes.",
            code=ExitCode.MACHINE,
        )
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    wanted: dict[str, Any] = {"shutdown_timeout": WEEK, "signals_to_handle": SIGNALS}
    os.environ |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(WEEK), "TORCHELASTIC_SIGNALS_TO_HANDLE": SIGNALS}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        **{name: wanted[name] for name in wanted if name in {field.name for field in fields(LaunchConfig)}},
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ[EXIT] = str(Path(folder) / "exit")
        code = int(ExitCode.INTERRUPTED)
        try:
            elastic_launch(config, sys.executable)("-m", "diffkit", *_without_gpus(sys.argv[1:]))
            code = 0
        except ChildFailedError as error:
            code = next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
        except SignalException:
            pass  # and the first process says how it ended
        with suppress(OSError, ValueError):
            code = int(Path(os.environ[EXIT]).read_text())
    sys.exit(code)


def report_exit(code: int) -> None:
    """Tell the launcher how the first process ended: that is how the command has ended."""
    if EXIT in os.environ and os.environ.get("RANK") == "0":
        with suppress(OSError):
            Path(os.environ[EXIT]).write_text(str(code))


def _without_gpus(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument.startswith("--gpus")):
            kept.append(argument)
        skip = argument == "--gpus"
    return kept
