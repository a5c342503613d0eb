"""Steps recorded once and replayed: the same training, whatever comes of the trial."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tape
from diffkit import builtin
from diffkit.backbones.unet import unet
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import edm, v
from diffkit.core.schedules import cosine, density, karras, over_range, sampling_grid
from diffkit.core.weighing import Uncertainty, Weigh, by_weighting
from diffkit.engine import gradients, graphs
from diffkit.engine.batches import Batches
from diffkit.engine.distributed import ALONE, World
from diffkit.engine.gradients import Gradients, Loss
from diffkit.engine.graphs import Graph
from diffkit.engine.optimizer import AdamW
from diffkit.engine.sample import Plan, _steps
from diffkit.engine.train import Progress, Recipe, Reduced, Remark, State, train
from test_train import SPEC, Memory, hungry, recipe

STEPS = 14


def network(dropout: float = 0.2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return unet(SPEC, **{"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": 4, "dropout": dropout, **options})


def trained(
    net: nn.Module, numbers: Recipe, *, graphs: bool, objective: Any = squared_error, world: World = ALONE
) -> tuple[State, list[Progress | Reduced | Remark]]:
    state = State(net, numbers)
    events = train(
        state,
        Denoiser(net, v),
        Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3),
        over_range(cosine, 0.002, 80.0),
        objective,
        numbers,
        until_images=STEPS * 8,
        cuda_graphs=graphs,
        world=world,
    )
    return state, list(events)


def same(one: State, other: State) -> None:
    for name, tensor in one.checkpoint().tensors.items():
        assert torch.equal(tensor, other.checkpoint().tensors[name]), name


def losses(events: list[Progress | Reduced | Remark]) -> list[float | None]:
    return [event.loss for event in events if isinstance(event, Progress)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """What is recorded, on the CPU, whose steps are taken to become faster by it."""
    found: list[Graph] = []

    def noted(*arguments: Any) -> Graph:
        found.append(tape.record(*arguments))
        return found[-1]

    monkeypatch.setattr(gradients, "graphs_on", lambda device: True)
    monkeypatch.setattr(gradients, "record", noted)
    monkeypatch.setattr(gradients, "GAIN_WANTED", 0.0)
    return found


@pytest.mark.parametrize("learned", [False, True])
def test_replayed_steps_are_the_same_training_bitwise(recorded: list[Graph], learned: bool) -> None:
    """With dropout, labels, dropped labels and mirrored images, each of which differs from step to step."""
    numbers = recipe(learned_weighting=learned)
    replayed, events = trained(network(), numbers, graphs=True)
    launched, plain = trained(network(), numbers, graphs=False)
    (graph,) = recorded
    assert graph.replay.__self__.replays == STEPS - gradients.WARM_UP - gradients.TIMED + 1  # type: ignore[attr-defined]
    assert losses(events) == losses(plain)
    same(replayed, launched)
    (remark,) = (event for event in events if isinstance(event, Remark))
    assert "one CUDA graph" in remark.text and remark.images_seen == 7 * 8


class Echo(World):
    """Of two processes, the other of which finds the same gradients and has nothing else to say."""

    def any(self, flag: bool) -> bool:
        return flag

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        values.mul_(2)
        return lambda: None


def test_gradients_of_replayed_steps_are_summed_over_processes(recorded: list[Graph]) -> None:
    """Each once, whether they were launched, recorded, compared or replayed."""
    replayed, events = trained(network(), recipe(), graphs=True, world=Echo(0, 2))
    launched, plain = trained(network(), recipe(), graphs=False, world=Echo(0, 2))
    (graph,) = recorded
    assert graph.replay.__self__.replays == STEPS - gradients.WARM_UP - gradients.TIMED + 1  # type: ignore[attr-defined]
    assert losses(events) == losses(plain)
    same(replayed, launched)


def test_what_is_not_faster_is_not_kept(recorded: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "GAIN_WANTED", 1e9)
    state, events = trained(network(), recipe(), graphs=True)
    assert recorded[0].replay.__self__.replays == 1 + gradients.TIMED  # type: ignore[attr-defined]
    (remark,) = (event for event in events if isinstance(event, Remark))
    assert "as fast without" in remark.text
    same(state, trained(network(), recipe(), graphs=False)[0])


class Counting(nn.Module):
    """A network with a state of its own, which each call in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.net(x, c_noise, label=label))
        return answer


def test_recording_leaves_no_trace_in_the_networks_own_state(recorded: list[Graph]) -> None:
    replayed, _ = trained(Counting(), recipe(), graphs=True)
    launched, _ = trained(Counting(), recipe(), graphs=False)
    same(replayed, launched)
    assert int(replayed.network.norm.num_batches_tracked) == STEPS  # type: ignore[union-attr, arg-type]


class Replacing(Counting):
    """The same, but by a new buffer at each call, of which a recording would see only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x, c_noise, label)


class Drawing(Counting):
    """Leaves something out by chance, by Python's own generator."""

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, c_noise, label) * (1 if random.random() < 2 else 0)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Replacing, "replaces its buffers"), (Drawing, "draws random numbers outside the device")]
)
def test_what_a_replay_would_not_do_is_found_out(recorded: list[Graph], kind: type[nn.Module], reason: str) -> None:
    state, events = trained(kind(), recipe(), graphs=True)
    (remark,) = (event for event in events if isinstance(event, Remark))
    assert reason in remark.text
    same(state, trained(kind(), recipe(), graphs=False)[0])
    if kind is Replacing:
        assert int(state.network.calls) == STEPS  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "kept"), [(60, True), (40, False)])
def test_a_graph_leaves_as_much_memory_as_it_takes(
    recorded: list[Graph], monkeypatch: pytest.MonkeyPatch, left: int, kept: bool
) -> None:
    monkeypatch.setattr(gradients, "memory_bytes", lambda device: 100)
    monkeypatch.setattr(gradients, "free_bytes", lambda device: left)
    _, events = trained(network(), recipe(), graphs=True)
    (remark,) = (event for event in events if isinstance(event, Remark))
    assert ("too little memory" not in remark.text) == kept


def deaf(graph: Graph) -> Graph:
    """One that answers for the inputs that it was recorded with."""
    return graph._replace(inputs=tuple(torch.zeros_like(each) for each in graph.inputs))


def nothing(graph: Graph) -> Graph:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("change", "reason"), [(deaf, "not the same"), (nothing, "operation not permitted when stream is capturing")]
)
def test_a_graph_that_fails_costs_a_line(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Graph], Graph], reason: str
) -> None:
    monkeypatch.setattr(gradients, "graphs_on", lambda device: True)
    monkeypatch.setattr(gradients, "record", lambda *arguments: change(tape.record(*arguments)))
    state, events = trained(network(), recipe(), graphs=True)
    (remark,) = (event for event in events if isinstance(event, Remark))
    assert reason in remark.text and remark.images_seen == 4 * 8 and "\n" not in remark.text
    same(state, trained(network(), recipe(), graphs=False)[0])


def test_a_network_that_looks_at_values_is_launched(recorded: list[Graph]) -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
            answer: Tensor = self.net(x, c_noise, label=label) if float(x.sum()) else x
            return answer

    _, events = trained(Looking(), recipe(), graphs=True)
    assert not recorded and any("not permitted" in event.text for event in events if isinstance(event, Remark))


def test_steps_of_several_passes_are_launched(recorded: list[Graph]) -> None:
    state, events = trained(network(), recipe(micro_batch=3), graphs=True)
    assert not recorded and not any(isinstance(event, Remark) for event in events)
    same(state, trained(network(), recipe(micro_batch=3), graphs=False)[0])


def test_want_of_memory_ends_the_trial(recorded: list[Graph]) -> None:
    state, events = trained(network(0.0), recipe(), graphs=True, objective=hungry(3))
    assert [event.micro_batch for event in events if isinstance(event, Reduced)] == [4, 2]
    assert not recorded
    same(state, trained(network(0.0), recipe(), graphs=False, objective=hungry(3))[0])


def test_a_graph_goes_when_passes_become_smaller(recorded: list[Graph]) -> None:
    """As in one process when another of them wants memory."""
    net = network()
    state = State(net, recipe())
    loss = Loss(Denoiser(net, v), over_range(cosine, 0.002, 80.0), squared_error, [], 0)
    found = Gradients(loss, net, state.optimizer, 8, graphs=True)
    batches = Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3)
    for first in range(0, 72, 8):
        found(batches.batch(first, 8), 8)
    graph = weakref.ref(recorded.pop().replay.__self__)  # type: ignore[attr-defined]
    assert graph() is not None
    found(batches.batch(72, 8), 4)
    gc.collect()
    assert graph() is None


def test_larger_steps_and_other_devices_are_launched(recorded: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "MOST_POSITIONS", 8 * 8 * 8 - 1)
    trained(network(), recipe(), graphs=True)
    monkeypatch.setattr(gradients, "MOST_POSITIONS", 2**21)
    monkeypatch.setattr(gradients, "graphs_on", lambda device: device.type == "cuda")
    trained(network(), recipe(), graphs=True)
    assert not recorded


# -------------------------------------------------------------------------- what is recorded never leaves the device


class Apart(TorchDispatchMode):
    """Refuses what a capture refuses: tensors of the CPU, but for single numbers, in work on the device ("meta")."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, found = tape.tensors((args, kwargs)), tape.tensors(result)
        devices = {each.device.type for each in given if each.dim()} | {each.device.type for each in found}
        assert len(devices) < 2, f"{function} moves from device to device"
        self.operations += "meta" in devices
        return result


def names(kind: str) -> list[str]:
    return sorted(getattr(builtin, kind)())


def step_on_the_device(schedule: str, prediction: str, weighting: str | None = None, task: str | None = None) -> None:
    """The work of a step on a batch that is there."""
    sigma_data = {"sigma_data": 0.5} if prediction == "edm" else {}
    predict = partial(resolve_name(builtin.predictions()[prediction]), **sigma_data)
    levels = over_range(resolve_name(builtin.schedules()[schedule]), 0.002, 80.0)
    show = None if task is None else resolve_name(builtin.tasks()[task])
    channels = {None: 0, "inpaint": 2}.get(task, 1)
    weighings: list[Weigh] = [Uncertainty().to("meta")]
    if weighting:
        weigh = resolve_name(builtin.weightings()[weighting])
        weighings.append(by_weighting(weigh, density(levels), predict, levels))
    net = unet(replace(SPEC, image_channels=channels), width=8, multipliers=(1, 2), attention=4, checkpoint=1).to(
        "meta"
    )
    loss = Loss(Denoiser(net, predict, near=task == "colorize"), levels, squared_error, weighings, 0)
    work = Gradients(loss, net, AdamW(list(net.parameters()), (0.9, 0.99), 0.0, None), 8, graphs=False)
    batch = Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3, task=show).batch(0, 8)
    there = batch.holding([each.to("meta") for each in batch.tensors])
    work._pass(there)  # which may bring tables there
    with Apart() as apart:
        result = work._pass(there)
    assert apart.operations > 500
    assert {each.device.type for each in result} == {"meta"}


@pytest.mark.parametrize("schedule", names("schedules"))
def test_no_step_of_a_schedule_waits(schedule: str) -> None:
    step_on_the_device(schedule, "edm")


@pytest.mark.parametrize("prediction", names("predictions"))
def test_no_step_of_a_prediction_waits(prediction: str) -> None:
    step_on_the_device("cosine", prediction)


@pytest.mark.parametrize("weighting", names("weightings"))
def test_no_step_with_a_weighting_waits(weighting: str) -> None:
    step_on_the_device("lognormal", "edm", weighting)


@pytest.mark.parametrize("task", [task for task in names("tasks") if task != "translate"])
def test_no_step_of_a_task_waits(task: str) -> None:
    step_on_the_device("cosine", "edm", task=task)


WITH_NOISE = {"ancestral", "ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde", "edm-stochastic"}


class Last(nn.Module):
    """Answers with its input: what is counted is what a sampler does beside it."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("name", [name for name in names("samplers") if name != "adaptive"])
def test_between_two_calls_a_sampler_never_waits_and_launches_little(name: str) -> None:
    """So the GPU is given the next replay before it is done with the last. (adaptive has to look at its errors.)"""
    denoiser = Denoiser(Last(), partial(edm, sigma_data=0.5))
    x, positions, sigmas = (
        torch.empty(2, 3, 8, 8, device="meta"),
        torch.arange(2, device="meta"),
        sampling_grid(over_range(karras, 0.002, 80.0), 15),
    )
    plan = Plan(resolve_name(builtin.samplers()[name]), sigmas, (0.0, 0.0, 0.0))
    with Apart() as apart:
        *_, last = _steps(plan, lambda x, s: denoiser(x, s), x, positions)
    assert last.device.type == "meta" and last.shape == x.shape
    assert apart.operations / 15 <= (400 if name in WITH_NOISE else 26)


# ---------------------------------------------------------------------------------- recording itself, on a GPU in play


class Gpu:
    """In place of `torch` in `diffkit.engine.graphs`: notes what is called of `torch.cuda`."""

    inference_mode, zeros_like = torch.inference_mode, torch.zeros_like

    def __init__(self, generator: Any) -> None:
        self.mode, self.modes, self.cuda = 0, list[Any](), self
        self.default_generators, self.capturing = (generator,), False

    def __getattr__(self, name: str) -> Any:
        return {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "current_device": lambda: 0}.get(
            name, lambda *_, **__: MagicMock()
        )

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        self.mode = mode
        self.modes.append(mode)

    @contextmanager
    def graph(self, *_: Any, **__: Any) -> Iterator[None]:
        self.capturing = True
        yield


def test_recording_gives_no_warning_and_leaves_the_mode_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors in these tests."""
    gpu = Gpu(torch.Generator())
    monkeypatch.setattr(graphs, "torch", gpu)
    modes = []
    graphs.record(lambda x: modes.append(gpu.mode) or (x + 1,), [torch.ones(2)], torch.device("cpu"))  # type: ignore[func-returns-value]
    assert modes == [0, "error", 0] and gpu.modes == ["error", 0]


def test_a_recording_that_fails_gives_the_generator_a_sound_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to torch 2.13 the state that it had goes on to refuse to draw."""
    generator = MagicMock()
    gpu = Gpu(generator)
    monkeypatch.setattr(graphs, "torch", gpu)

    def fails(x: Tensor) -> tuple[Tensor]:
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (x,)

    with pytest.raises(RuntimeError, match="capturing"):
        graphs.record(fails, [torch.ones(2)], torch.device("cpu"))
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
    generator.reset_mock()
    graphs.record(lambda x: (x,), [torch.ones(2)], torch.device("cpu"))
    generator.graphsafe_set_state.assert_not_called()


def test_a_copy_of_a_generators_state_goes_on_where_it_was() -> None:
    """Which recording counts on."""
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    state = generator.clone_state()
    expected = torch.rand(4, generator=generator)
    torch.rand(7, generator=generator)
    assert torch.equal(torch.rand(4, generator=state), expected)


def test_whatever_a_recording_raises_a_network_answers_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Graph:
        raise UserWarning("as an error")

    monkeypatch.setattr(graphs, "graphs_on", lambda device: True)
    monkeypatch.setattr(graphs, "record", fails)
    graphed = graphs.Graphed(Last().eval()).eval()
    with torch.no_grad():
        assert torch.equal(graphed(torch.ones(1, 1, 2, 2), torch.ones(1)), torch.ones(1, 1, 2, 2))
