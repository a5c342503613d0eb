"""How a network is run: the faster way by trial; a compiler that fails costs a line, not the training."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffkit
from conftest import TINY, call_diffkit
from diffkit.config import read_toml
from diffkit.engine.speed import ON_A_GPU, Way, choose_way


class Slow(nn.Module):
    """A convolution that takes longer with its channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        time.sleep(0.0 if last else 0.02)
        answer: Tensor = self.conv(x)
        return answer


def attempt(network: nn.Module) -> Tensor:
    answer: Tensor = network(torch.ones(1, 4, 8, 8))
    return answer


def no_compiler(*arguments: object, **options: object) -> nn.Module:
    raise RuntimeError("no C++ compiler here\nand much more")


def test_the_faster_layout_is_chosen_and_a_failing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)
    network = Slow()
    way, notes = choose_way(network, attempt, ON_A_GPU)
    assert way == Way(channels_last=True)
    assert notes == ["Not compiled, channels last: RuntimeError: no C++ compiler here"]
    assert network.conv.weight.grad is None


def test_if_all_ways_fail_the_answer_is_the_plain_one() -> None:
    def broken(network: nn.Module) -> Tensor:
        raise RuntimeError("no such kernel")

    way, notes = choose_way(Slow(), broken, (Way(True, True),))
    assert way == Way(channels_last=True) and len(notes) == 1


def test_want_of_memory_is_no_reason_against_a_way() -> None:
    def broken(network: nn.Module) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        choose_way(Slow(), broken, ON_A_GPU)


def test_a_training_goes_on_without_its_compiler(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)
    command = ("train", dataset, "-o", tmp_path / "run", "--set", "train.compile=on", *TINY)
    done = call_diffkit(*command, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler here" in done.stderr
    assert read_toml(tmp_path / "run" / "config.toml")["train"]["compile"] == "off"
    done = call_diffkit(*command, "--steps", 4)  # the same command goes on
    assert done.returncode == 0 and "going on from 16 images" in done.stderr, done.stderr


@pytest.mark.skipif("DIFFKIT_LONG" not in os.environ, reason="make test-long: compiling takes a minute, and a compiler")
def test_a_compiled_training_resumes_and_its_model_needs_no_compiler(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train", dataset, "-o", run, "--set", "train.compile=on", "--precision", "float32", *TINY)
    plain = ("train", dataset, "-o", tmp_path / "plain", "--precision", "float32", *TINY)
    assert call_diffkit(*plain, "--steps", 4).returncode == 0
    for steps in (2, 4):
        done = call_diffkit(*command, "--steps", steps)
        assert done.returncode == 0, done.stderr
        assert "Not compiled" not in done.stderr
    assert read_toml(run / "config.toml")["train"]["compile"] == "on"
    one, other = (diffkit.load(path, device="cpu").sample(4, steps=3) for path in (run, tmp_path / "plain"))
    assert abs(one.astype(int) - other).max() <= 2
