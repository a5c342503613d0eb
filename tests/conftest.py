"""What all tests share: one thread a process, no GPU, a small prepared data set, a shared tiny run."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several run at once

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests and from the commands they start, so that `--device auto` is the CPU everywhere.

    `pytest -m gpu` runs those that need one.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_diffkit(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`diffkit ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "diffkit", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def call_diffkit(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has torch in memory already: for the many commands that end soon."""
    from diffkit import cli, registry

    out, err, code = io.StringIO(), io.StringIO(), 0
    before = Path.cwd()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    unraisable = sys.unraisablehook
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["diffkit", *map(str, arguments)])
        patch.setattr(registry, "_registry", None)
        patch.setenv("COLUMNS", "200")
        try:
            os.chdir(cwd or before)
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os.chdir(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.unraisablehook = unraisable
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 12)) -> Path:
    """Real PNG files: class number k is a bright bar in row 2 + 3k, at a place that varies."""
    for row, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((*size, 3), 20, np.uint8)
            pixels[2 + 3 * row : 4 + 3 * row, index % 5 : index % 5 + 6] = (200, 80 + index % 100, 40)
            Image.fromarray(pixels).save(folder / name / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 60 images of 12x12 in two classes, made by the command line."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images", {"high": 30, "low": 30})
    done = run_diffkit("prepare", folder / "images", "-o", folder / "set", "--size", 12, "--holdout", "10%")
    assert done.returncode == 0, done.stderr
    return folder / "set"


TINY = ("--backbone", "unet:width=8,multipliers=[1,2],blocks=1,attention=0", "--batch-size", "8", "--device", "cpu")


@pytest.fixture(scope="session")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on that set."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_diffkit("train", dataset, "-o", folder, "--steps", 6, "--precision", "float32", *TINY)
    assert done.returncode == 0, done.stderr
    return folder
