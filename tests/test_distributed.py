"""Two processes (torchrun, gloo) train and sample like one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import TINY, call_diffkit, run_diffkit
from diffkit.durable import read_lines
from diffkit.engine.distributed import World
from diffkit.engine.peers import OtherFailed
from diffkit.errors import DiffkitError, ExitCode
from diffkit.measure.features import features
from diffkit.measure.images import ImageSet
from diffkit.rundir import RunDir

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffkit")
OPTIONS = ("--precision", "float32", "--validate-every", 16, "--preview-every", 24, *TINY)


def start(*arguments: object, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run / "metrics.jsonl") if "loss" in record]


def held_out(run: Path) -> dict[int, float]:
    records = read_lines(run / "metrics.jsonl")
    return {record["images"]: record["holdout_loss"] for record in records if "holdout_loss" in record}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 7, 8, 64])
def test_the_shares_are_everything_once(size: int, count: int) -> None:
    parts = [list(range(count))[World(rank, size).share(count)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_then_two_then_one_process_train_like_one_and_sample_the_same(dataset: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run_diffkit("train", dataset, "-o", alone, "--steps", 9, *OPTIONS).returncode == 0
    for steps in (3, 6, 9):
        command = ("train", dataset, "-o", shared, "--steps", steps, *OPTIONS)
        done = run_two(*command) if steps == 6 else run_diffkit(*command)
        assert done.returncode == 0, done.stderr
        if steps == 6:
            assert "and 1 more like it" in done.stderr
            assert done.stderr.count("Done after") == 1  # only one of them speaks
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    one, other = (held_out(run) for run in (alone, shared))
    assert len(one) == 5 and {images: other[images] for images in one} == pytest.approx(one, rel=1e-5)
    sheets = [{path.name for path in (run / "samples").iterdir()} for run in (alone, shared)]
    assert len(sheets[0]) == 3 and sheets[0] <= sheets[1]
    assert [record["processes"] for record in read_lines(shared / "sessions.jsonl")] == [1, 2, 1]

    options = ("-n", 9, "--steps", 3, "--device", "cpu")
    assert run_diffkit("sample", alone, "-o", tmp_path / "a", *options).returncode == 0
    done = run_two("sample", alone, "-o", tmp_path / "b", *options)
    assert done.returncode == 0, done.stderr
    records = read_lines(tmp_path / "b" / "samples.jsonl")
    assert records == read_lines(tmp_path / "a" / "samples.jsonl")
    for record in records:
        pictures = [np.asarray(Image.open(tmp_path / name / record["file"])).astype(int) for name in "ab"]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def image_set(count: int, read: Callable[[np.ndarray], np.ndarray]) -> ImageSet:
    return ImageSet("made", count, (4, 4, 3), None, read, str)


def looked_at(images: ImageSet, world: World) -> torch.Tensor:
    work = features(images, torch.nn.Flatten(), torch.device("cpu"), world=world)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def test_sets_too_small_to_share_are_looked_at_whole_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one with nothing to look at would not know how long a row is, and the others would wait."""
    monkeypatch.setattr(World, "any", lambda self, flag: flag)
    pixels = np.arange(3 * 48, dtype=np.uint8).reshape(3, 4, 4, 3)
    for rank in range(4):
        found = looked_at(image_set(3, lambda indices: pixels[indices]), World(rank, 4))
        assert found.shape == (3, 48) and float(found.sum()) == float(pixels.sum())


def test_the_process_that_cannot_read_an_image_speaks_and_the_others_end_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(indices: np.ndarray) -> np.ndarray:
        if indices.max() >= 5:
            raise DiffkitError("picture 5 cannot be read.", code=ExitCode.DATA)
        return np.zeros((len(indices), 4, 4, 3), np.uint8)

    monkeypatch.setattr(World, "any", lambda self, flag: True)
    with pytest.raises(DiffkitError, match="picture 5") as caught:
        looked_at(image_set(8, read), World(1, 2))
    assert caught.value.personal and caught.value.code == ExitCode.DATA
    with pytest.raises(OtherFailed) as caught:
        looked_at(image_set(8, read), World(0, 2))
    assert caught.value.silent and not caught.value.personal and caught.value.code == ExitCode.DATA


def test_exact_elastic_is_bitwise_with_one_process_two_and_one_again(dataset: Path, tmp_path: Path) -> None:
    options = (*TINY, "--precision", "float32", "--preview-every", 0, "--exact-elastic")
    network = ("--backbone", "unet:width=8,multipliers=[1],blocks=1,attention=0,dropout=0.1", "--batch-size", 16)

    def train(run: Path, steps: int, *more: object) -> None:
        done = run_diffkit(
            "train", dataset, "-o", run, "--steps", steps, *options, *network, *more, OMP_NUM_THREADS="1"
        )
        assert done.returncode == 0, done.stderr

    whole, elastic = tmp_path / "whole", tmp_path / "elastic"
    train(whole, 6)
    for steps, more in ((2, ()), (4, ("--gpus", 2)), (6, ())):
        train(elastic, steps, *more)
    for name in ("model.safetensors", "checkpoints/images-000000000096/state.safetensors"):
        own, other = load_file(whole / name), load_file(elastic / name)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    losses = [
        [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in (whole, elastic)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    done = call_diffkit("train", dataset, "-o", tmp_path / "odd", *options, "--batch-size", 12)
    assert done.returncode == ExitCode.USAGE and "must be a multiple of 8" in done.stderr


def test_two_processes_evaluate_like_one(
    dataset: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (run, "-n", 24, "--steps", 2, "--json", "--device", "cpu")
    found = []
    for name, evaluate in (("one", run_diffkit), ("two", run_two)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))  # so that both look at the real images, too
        done = evaluate("evaluate", *options, "-o", tmp_path / f"{name}-figures")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    one, two = found
    assert two["samples"] == 24 and len(two["closest"]) == len(one["closest"])
    for mine, other in zip(one["metrics"], two["metrics"], strict=True):
        assert mine["name"] == other["name"]
        assert other["value"] == pytest.approx(mine["value"], rel=1e-3, abs=1e-4)
    folders = [tmp_path / f"{name}/diffkit/features" for name in ("one", "two")]
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}
    for path in folders[0].iterdir():
        torch.testing.assert_close(load_file(folders[1] / path.name), load_file(path), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_shared_is_refused(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("train", dataset, "-o", tmp_path / "a", "--gpus", 999, "--device", "cpu")
    assert done.returncode == ExitCode.MACHINE and "--gpus 999: this machine has" in done.stderr
    command = ("train", dataset, "-o", tmp_path / "b", "--gpus", 2, *TINY, "--batch-size", 1)
    done = run_diffkit(*command)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert done.stderr.count("cannot be shared by 2 processes") == 1
    run = RunDir(tmp_path / "b")
    with run.locked():
        done = run_diffkit(*command[:4], *TINY, "--gpus", 2)
    assert done.returncode == ExitCode.LOCKED, done.stderr
    assert done.stderr.count("is being trained by") == 1 and "Bug" not in done.stderr


def test_a_signal_to_the_launcher_saves_and_one_process_goes_on(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train", dataset, "-o", run, "--steps", 100_000, "--validate-every", 0, "--gpus", 2, *TINY)
    process = start(*command, launcher=(sys.executable, "-m", "diffkit"))
    for _ in range(600):
        time.sleep(0.1)
        if len(losses(run)) > 5:
            break
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert len(re.findall("Stopped and saved after", err)) == 1, err
    assert process.returncode == ExitCode.RESUMABLE
    seen = max(record["images"] for record in read_lines(run / "metrics.jsonl"))
    done = run_diffkit("train", dataset, "-o", run, "--steps", seen // 8 + 2, "--validate-every", 0, *TINY)
    assert done.returncode == 0 and f"going on from {seen:,} images" in done.stderr, done.stderr
