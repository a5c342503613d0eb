"""How a machine computes, on GPUs that are only pretended: tensors stay on the CPU, and the clock is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import call_diffkit
from diffkit.compose import machine, ready
from diffkit.compose.machine import ENDLESS, Length, with_way
from diffkit.compose.model import Model
from diffkit.compose.ready import Follower, for_many
from diffkit.config import Settings, validated
from diffkit.core.denoiser import Denoiser
from diffkit.core.predictions import edm, x0
from diffkit.engine import devices, speed
from diffkit.engine.devices import check_precision, choose_kernels, choose_precision, is_memory
from diffkit.engine.distributed import ALONE
from diffkit.engine.graphs import Graphed
from diffkit.engine.pieces import Pieces
from diffkit.engine.sample import Plan, sample
from diffkit.engine.speed import OfOneShape, Way
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from parts import samplers

CUDA = torch.device("cuda", 0)
SPEC = ImageSpec(3, 4, 4)
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


class Network(nn.Module):
    """Takes a second a pass, 0.8 with channels last, a part of that compiled; its last weights begin as zeros."""

    seconds = 0.0
    share = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        for each in self.last.parameters():
            nn.init.zeros_(each)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        Network.seconds += (0.8 if last else 1.0) * Network.share
        self.seen = [x.detach(), c_noise, self.last.weight.detach().clone()]
        answer: Tensor = self.last(self.conv(self.norm(x)))
        return answer


class Compiled(nn.Module):
    """In half the time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = [network]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.inner[0].parameters(recurse)

    def train(self, mode: bool = True) -> Compiled:
        self.inner[0].train(mode)
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        before, Network.share = Network.share, 0.5
        answer: Tensor = self.inner[0](*inputs)
        Network.share = before
        return answer


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was asked of it."""
    asked: list[str] = []
    Network.seconds, Network.share = 0.0, 1.0
    monkeypatch.setattr(torch, "compile", lambda network, **_: asked.append("compile") or Compiled(network))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Network.seconds)
    monkeypatch.setattr(machine.durable, "cache_folder", lambda: tmp_path / "cache")
    return asked


def settings(**train: Any) -> Settings:
    return validated({"train": {"batch_size": 8, "micro_batch": 8, "precision": "float32", **train}})


def chosen(length: Length = ENDLESS, probe: bool = True, **train: Any) -> tuple[Settings, Way, list[str]]:
    return with_way(settings(**train), Network(), SPEC, CUDA, probe=probe, world=ALONE, length=length)


@pytest.mark.parametrize(
    ("length", "compiled"),
    [
        (ENDLESS, True),
        (Length(seconds=40.0), False),
        (Length(seconds=4000.0), True),
        (Length(steps=100), False),
        (Length(steps=1000), True),
        (Length(images=800), False),
        (Length(images=8000), True),
        (Length(steps=1000, seconds=40.0), False),
    ],
)
def test_compiling_is_tried_where_the_training_is_long_enough(gpu: list[str], length: Length, compiled: bool) -> None:
    found, way, notes = chosen(length)
    assert way == Way(channels_last=True, compiled=compiled)
    assert (found.train.channels_last, found.train.compile) == (True, "on" if compiled else "off")
    assert ("compile" in gpu) == compiled and bool(notes) != compiled
    assert compiled or "Not compiled" in notes[0]
    assert gpu[-2:] == ["empty", "reset"]  # what the trial held does not count


def test_compiling_that_is_asked_for_is_done_however_short() -> None:
    assert chosen(Length(seconds=1.0), compile="on")[1:] == (Way(True, True), [])


def test_a_process_that_did_not_begin_the_run_takes_what_is_recorded(gpu: list[str]) -> None:
    assert chosen(Length(seconds=1.0), probe=False, compile="off", channels_last=False)[1] == Way()
    assert "compile" not in gpu and Network.seconds == 0
    assert chosen(Length(seconds=1.0), probe=False, compile="on", channels_last=True)[1] == Way(True, True)


def test_trials_are_of_noise_and_leave_no_trace() -> None:
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with_way(settings(), network, SPEC, CUDA, probe=True, world=ALONE, length=ENDLESS)
    x, c_noise, weight = network.seen
    assert all(0.3 < float(each.std()) < 3 for each in (x, c_noise)) and float(weight.std()) > 0
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not after["last.weight"].any()


def test_a_trial_too_large_for_the_memory_is_made_smaller(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = Network(), []
    forward = network.forward

    def small(x: Tensor, c_noise: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, c_noise)

    monkeypatch.setattr(network, "forward", small)
    found, way, _ = with_way(settings(), network, SPEC, CUDA, probe=True, world=ALONE, length=ENDLESS)
    assert sizes[:3] == [8, 4, 2] and way.channels_last and found.train.micro_batch == 8


def test_the_layout_for_sampling_is_found_once_and_remembered(tmp_path: Path) -> None:
    network = machine.for_sampling(Network().eval().requires_grad_(False), SPEC, CUDA, "float32")
    assert isinstance(network, Graphed) and speed.layout_of(network.network) == Way(channels_last=True)
    spent = Network.seconds
    again = machine.for_sampling(Network().eval(), SPEC, CUDA, "float32")
    assert Network.seconds == spent and speed.layout_of(again) == Way(channels_last=True)
    (kept,) = (tmp_path / "cache" / "layouts").iterdir()
    kept.write_text("{}")  # of another version, perhaps
    machine.for_sampling(Network().eval(), SPEC, CUDA, "float32")
    assert Network.seconds > spent


@pytest.mark.parametrize(("calls", "share", "compiled"), [(299, 9.0, False), (400, 0.7, False), (400, 1.0, True)])
def test_many_samples_are_compiled_if_it_pays(gpu: list[str], calls: int, share: float, compiled: bool) -> None:
    Network.share = share
    network = Network().eval().requires_grad_(False)
    denoiser = Denoiser(Graphed(network), x0)
    found = for_many(denoiser, SPEC, CUDA, 8, calls)
    assert ("compile" in gpu) == isinstance(found.network, OfOneShape) == compiled
    assert (found is denoiser) != compiled
    assert not network.training
    model = Model(Settings(), SPEC, (), denoiser, CUDA, 0)
    found, before = model._denoiser_for(8, calls), gpu.count("compile")
    assert (model._denoiser_for(8, calls) is found) and gpu.count("compile") == before


class Plus(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        return x + self.number


def test_only_the_shape_that_was_compiled_is_answered_by_it() -> None:
    network = OfOneShape(Plus(1.0), Plus(2.0), (2, 3, 4, 4))
    answers = [network(torch.zeros(batch, 3, 4, 4), torch.zeros(batch), label=torch.zeros(batch)) for batch in (1, 2)]
    assert [float(each.mean()) for each in answers] == [1.0, 2.0]


def test_previews_follow_the_average_in_a_layout_of_their_own() -> None:
    average = Network().eval().requires_grad_(False)
    follower = Follower(SPEC, CUDA, "float32")
    first = follower(average)
    places = [each.data_ptr() for each in first.parameters()]
    assert first is not average and speed.layout_of(first).channels_last and not speed.layout_of(average).channels_last
    average.conv.weight.add_(1.0)
    average.norm.running_mean.add_(2.0)  # type: ignore[union-attr, operator]
    assert follower(average) is first and places == [each.data_ptr() for each in first.parameters()]
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in first.state_dict().items())
    assert not first.training
    assert Follower(SPEC, torch.device("cpu"), "float32")(average) is average


def test_without_memory_for_a_copy_the_average_itself_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ready, "adapt", too_much)
    average = Network().eval()
    follower = Follower(SPEC, CUDA, "float32")
    assert follower(average) is average and follower(average) is average


def fits(most: int, work: Callable[[slice], list[int]], error: Exception) -> Callable[[slice], list[int]]:
    def limited(some: slice) -> list[int]:
        if some.stop - some.start > most:
            raise error
        return work(some)

    return limited


@pytest.mark.parametrize("most", range(1, 9))
def test_what_the_memory_does_not_hold_is_done_in_halves(most: int) -> None:
    numbers = list(range(19))
    pieces = Pieces(8)
    found = [*pieces(fits(most, numbers.__getitem__, torch.OutOfMemoryError("out of memory")), 19)]
    assert [each for some in found for each in some] == numbers
    assert max(map(len, found)) == pieces.most == 2 ** (most.bit_length() - 1)


def test_a_single_image_that_does_not_fit_and_other_errors_are_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        next(Pieces(8)(fits(0, list(range(8)).__getitem__, torch.OutOfMemoryError("out of memory")), 8))
    with pytest.raises(RuntimeError, match="shape"):
        next(Pieces(8)(fits(4, list(range(8)).__getitem__, RuntimeError("wrong shape")), 8))


class Hungry(nn.Module):
    """Runs out of memory at more than three images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("CUDA out of memory")
        answer: Tensor = self.conv(x)
        return answer


def test_samples_are_the_same_in_smaller_batches() -> None:
    network, plan = Hungry(), Plan(samplers.ancestral, [8.0, 1.0, 0.1, 0.0], (0.0, 0.0, 0.0))
    denoiser = Denoiser(network, lambda s: edm(s, sigma_data=0.5))
    made = [*sample(denoiser, SPEC, plan, range(9), batch_size=8)]
    assert [each.indices for each in made] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    for batch in made:
        (alone,) = sample(denoiser, SPEC, plan, batch.indices[-1:])
        assert (batch.pixels[-1:] == alone.pixels).all()


def test_a_missing_engine_is_want_of_memory_only_where_memory_has_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_memory(NO_ENGINE)
    failures = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": failures[0]})
    assert not is_memory(NO_ENGINE)
    failures[0] = 1
    assert is_memory(NO_ENGINE) and not is_memory(RuntimeError("wrong shape")) and not is_memory(ValueError())


def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward() -> Tensor:
        raise AssertionError("nothing has to be tried")

    assert choose_precision("auto", CUDA, forward) == "float32"
    with pytest.raises(DiffkitError, match=r"Tesla T4\) has no bfloat16: its compute capability is 7\.5") as caught:
        check_precision("bfloat16", CUDA)
    assert caught.value.code == ExitCode.MACHINE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_precision("auto", CUDA, forward) == "bfloat16"


def test_float16_is_refused_with_the_reason(dataset: Path) -> None:
    with pytest.raises(DiffkitError, match="No precision called"):
        check_precision("float16", torch.device("cpu"))
    done = call_diffkit("train", dataset, "--precision", "float16")
    assert done.returncode == ExitCode.USAGE and "float16 is not offered: gradients" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("exact", "deterministic", "tried"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_kernels_are_chosen_by_trial_unless_bits_matter(
    monkeypatch: pytest.MonkeyPatch, exact: bool, deterministic: bool, tried: bool
) -> None:
    monkeypatch.setattr(devices.torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with torch.backends.cudnn.flags(benchmark=False):
        choose_kernels(torch.device("cpu"), exact)
        assert not torch.backends.cudnn.benchmark
        choose_kernels(CUDA, exact)
        assert torch.backends.cudnn.benchmark == tried
        machine.for_sampling(Network().eval(), SPEC, CUDA, "float32")
        assert not torch.backends.cudnn.benchmark
