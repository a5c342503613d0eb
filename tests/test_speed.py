"""How a network is run: the faster way by trial; a compiler that fails costs a line, not the training."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkit
from conftest import TINY, call_diffkit
from diffkit.backbones.unet import unet
from diffkit.config import read_toml
from diffkit.engine import devices
from diffkit.engine.graphs import Graphed
from diffkit.engine.speed import LAYOUTS, ON_A_GPU, Way, choose_way, layout_of, precast, prepared
from diffkit.errors import ExitCode
from diffkit.interfaces import ImageSpec


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


@pytest.mark.parametrize(("gain", "precision"), [(2.0, "bfloat16"), (1.05, "float32"), (0.1, "float32")])
def test_the_faster_precision_is_chosen_while_the_machine_is_disturbed(
    monkeypatch: pytest.MonkeyPatch, gain: float, precision: str
) -> None:
    now, weight = [0.0], torch.ones((), requires_grad=True)

    def forward() -> Tensor:
        seconds = 0.04 / (gain if torch.is_autocast_enabled("cpu") else 1.0)
        now[0] += seconds * (4 if 0.15 < now[0] < 0.6 else 1)  # something else runs
        return weight * 1.0

    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    assert devices.choose_precision("auto", torch.device("cpu"), forward) == precision


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


def test_a_run_can_be_compiled_from_a_later_start_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)  # which shows that it was asked
    command = ("train", dataset, "-o", tmp_path / "run", "--device", "cpu", *TINY)
    for steps, words, tried in ((1, (), False), (2, ("--set", "train.compile=on"), True), (3, (), False)):
        done = call_diffkit(*command, "--steps", steps, *words)
        assert done.returncode == 0 and ("no C++ compiler here" in done.stderr) == tried, done.stderr


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


def test_weights_changed_once_give_the_same_images_as_autocast_at_every_call() -> None:
    spec = ImageSpec(3, 16, 16, ("a", "b"))
    torch.manual_seed(0)
    network = unet(spec, width=16, multipliers=(1, 2), blocks=1, attention=8).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) / 10)
    x, c_noise, label = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.eye(2)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            answer: Tensor = network(x, c_noise, label=label)
        return answer

    before = call()
    precast(network, call, "cpu", torch.bfloat16)
    assert torch.equal(call(), before) and call().dtype == torch.float32
    types = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert types["encoder.0.blocks.0.conv1.weight"] == torch.bfloat16
    assert types["stem.weight"] == types["head.2.weight"] == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True])
def test_a_replayed_call_answers_as_the_network_does(half: bool) -> None:
    network = unet(ImageSpec(3, 32, 32), width=32, multipliers=(1, 2)).cuda().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) / 10)
    graphed = Graphed(network)
    for batch in (1, 3, 1):
        x, c_noise = torch.randn(batch, 3, 32, 32, device="cuda"), torch.randn(batch, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=half), torch.inference_mode():
            torch.testing.assert_close(graphed(x, c_noise), network(x, c_noise), rtol=0.02, atol=0.02)
    assert len(graphed._graphs) == 2 and None not in graphed._graphs.values()


def test_elsewhere_a_graphed_network_is_the_network() -> None:
    network = unet(ImageSpec(3, 16, 16), width=16, multipliers=(1, 2)).eval()
    x, c_noise = torch.randn(2, 3, 16, 16), torch.zeros(2)
    with torch.inference_mode():
        assert torch.equal(Graphed(network)(x, c_noise), network(x, c_noise))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_fetched_again_page_by_page() -> None:
    code = """
import resource, sys, torch
from diffkit.engine.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for mebibytes in range(4, 24):  # ever larger: glibc learns from what was freed, but only up to its size
    some = [torch.ones(mebibytes * 2**18) for _ in range(6)]
    del some
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    found = [
        int(subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True).stdout)
        for word in ("keep", "plain")
    ]
    assert 4 * found[0] < found[1]


def test_a_precision_that_the_device_lacks_is_refused(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def without(*size: int, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on this device")
        return zeros(*size, dtype=dtype, **rest)

    monkeypatch.setattr(torch, "zeros", without)
    done = call_diffkit("train", dataset, "--device", "cpu", "--precision", "bfloat16")
    assert done.returncode == ExitCode.MACHINE and "has no bfloat16" in done.stderr, done.stderr
    assert "--precision float32" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as on Linux")
def test_a_thread_beside_the_training_uses_no_other_and_changes_nothing_for_others() -> None:
    code = """
import threading, torch
from pathlib import Path
from diffkit.engine.threads import beside
def running():
    return len(list(Path("/proc/self/task").iterdir()))
torch.set_num_threads(3)
large = torch.rand(2**22)
def in_a_thread():
    found.append(torch.get_num_threads())
with beside("a") as pool:
    print(pool.submit(torch.get_num_threads).result(), torch.get_num_threads())
    before = running()
    for _ in range(3):
        pool.submit(large.exp).result()
    print(running() - before)
    found = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    print(found[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3", "0", "3"]


class Fusible(nn.Module):
    """A layer with a kernel of its own, which may be broken."""

    def __init__(self, works: bool) -> None:
        super().__init__()
        self.weight, self.works, self.fused_kernel = nn.Parameter(torch.ones(4, 1, 1)), works, False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_kernel and not self.works:
            raise RuntimeError("no kernel here")
        time.sleep(0.0 if self.fused_kernel else 0.01)
        return x * self.weight


def test_a_layers_own_kernel_is_used_where_it_is_faster_and_left_where_it_fails() -> None:
    for works in (True, False):
        network = nn.Sequential(Fusible(works))
        way, notes = choose_way(network, attempt, LAYOUTS)
        assert way.fused == works and len(notes) == (0 if works else 1)
        assert layout_of(prepared(network, way)).fused == works
        assert choose_way(network, attempt, (Way(fused=True),))[0] == Way(fused=works)
    assert "Not eager, channels last, fused norms: RuntimeError: no kernel here" in notes
    assert choose_way(nn.Sequential(nn.Conv2d(4, 4, 1)), attempt, (Way(), Way(fused=True)))[0] == Way()
