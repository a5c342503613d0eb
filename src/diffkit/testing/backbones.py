"""Checks of networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffkit.interfaces import ImageSpec
from diffkit.testing.signature import Expect, Options, check_signature, expectations

if TYPE_CHECKING:
    from torch import Tensor, nn

    Sampler = Callable[..., Iterator[Tensor]]


def check_backbone(function: Callable[..., nn.Module], /, **options: Any) -> None:
    """A backbone `(spec, *, options) -> nn.Module`, `forward(x, c_noise, **condition) -> [B, C, H, W]`.

    For gray and colour, sides that are not multiples of anything, classes and a conditioning image: the
    output is finite, float32 and of the right shape; an image does not depend on its neighbours in the batch;
    the condition counts; a label of zeros is the same as none; a gradient reaches every parameter; the state
    dictionary goes through safetensors and back; the module can be copied.
    """
    import torch

    expect = expectations(function)
    check_signature(expect, function, 1, options)
    shapes = [ImageSpec(1, 12, 20), ImageSpec(3, 17, 23), ImageSpec(3, 16, 16, image_channels=1)]
    # Large enough that attention at a sixteenth of the side still has more than one position to choose from.
    trained = [
        ImageSpec(3, 24, 24),
        ImageSpec(3, 24, 24, classes=("a", "b", "c")),
        ImageSpec(1, 24, 24, classes=("a", "b", "c"), image_channels=2),
    ]
    with torch.random.fork_rng(devices=[]), _one_thread():
        for spec in shapes + trained:
            _check_network(expect, function, spec, options, gradients=spec in trained)


@dataclass(frozen=True)
class _Trial:
    """A network and one batch for it; `where` names the case in messages."""

    expect: Expect
    network: nn.Module
    x: Tensor
    c_noise: Tensor
    condition: dict[str, Tensor]
    where: str

    def run(
        self,
        network: nn.Module | None = None,
        condition: dict[str, Tensor] | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """The output for the batch, or with another network, another condition, or some rows only."""
        condition = self.condition if condition is None else condition
        chosen = {name: value[rows] for name, value in condition.items()}
        y: Tensor = (network or self.network)(self.x[rows], self.c_noise[rows], **chosen)
        return y

    def wants(self, condition: bool, wanted: str, got: object) -> None:
        self.expect(condition, f"{wanted} {self.where}", got)

    def wants_same(self, wanted: str, one: Tensor, other: Tensor, limit: float = 1e-5) -> None:
        """Within `limit`, in units of the larger of 1 and the deviation of the output."""
        difference = float((one - other).abs().max()) / max(1.0, float(one.std()))
        self.wants(difference < limit, wanted, f"a difference of {difference:.3g}")


def _check_network(
    expect: Expect, function: Callable[..., nn.Module], spec: ImageSpec, options: Options, *, gradients: bool
) -> None:
    """All checks of one network, in eval mode, its parameters shaken so that no output is zero by design."""
    import torch

    torch.manual_seed(0)
    network = function(spec, **options)
    expect(isinstance(network, torch.nn.Module), "a torch.nn.Module", type(network).__name__)
    _shake(network.eval())
    trial = _trial(expect, network, spec)
    with torch.no_grad():
        y = _check_output(trial)
        trial.wants_same("image 1 alone as in a batch of 2", y[1:2], trial.run(rows=slice(1, 2)), 1e-4)
        _check_condition(trial, y)
        _check_state(trial, y, function(spec, **options))
    if gradients:
        _check_gradients(trial)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks gain little from threads, and lose much where other processes want the cores too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shake(network: nn.Module) -> None:
    """Add a little noise to every parameter."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _trial(expect: Expect, network: nn.Module, spec: ImageSpec, batch: int = 2) -> _Trial:
    """Random x [B, C, H, W], c_noise [B] and the condition that the spec declares."""
    import torch

    x, c_noise = torch.randn(batch, spec.channels, spec.height, spec.width), torch.linspace(-1.5, 1.4, batch)
    condition = {}
    if spec.classes:
        condition["label"] = torch.eye(spec.label_width)[torch.arange(batch) % spec.label_width]
    if spec.image_channels:
        condition["image"] = torch.randn(batch, spec.image_channels, spec.height, spec.width)
    where = " and ".join([f"for {spec.channels}x{spec.height}x{spec.width}", *condition])
    return _Trial(expect, network, x, c_noise, condition, where)


def _check_output(trial: _Trial) -> Tensor:
    """The output: of the shape of x, float32, finite, not zero, the same twice; x itself left alone."""
    import torch

    before = trial.x.clone()
    y = trial.run()
    trial.wants(torch.equal(trial.x, before), "x left as it was", "it was changed in place")
    trial.wants(y.shape == before.shape, f"an output of shape {tuple(before.shape)}", tuple(y.shape))
    trial.wants(y.dtype == torch.float32, "a float32 output", y.dtype)
    trial.wants(bool(y.isfinite().all()), "a finite output", "inf or nan")
    trial.wants(bool(y.ne(0).any()), "an output once no parameter is zero", "all zeros")
    trial.wants_same("the same output twice in eval mode", y, trial.run())
    return y


def _check_condition(trial: _Trial, y: Tensor) -> None:
    """Each condition changes the output, and a label of zeros is no label, if the label may be left out."""
    for name, value in trial.condition.items():
        without = trial.run(condition={**trial.condition, name: value * 0})
        trial.wants(not y.equal(without), f"an output that depends on '{name}'", "the same one for zeros")
        if name == "label":
            others = {other: trial.condition[other] for other in trial.condition if other != "label"}
            try:
                absent = trial.run(condition=others)
            except TypeError:
                continue
            trial.wants_same("label zeros to mean no label", without, absent)


def _check_state(trial: _Trial, y: Tensor, fresh: nn.Module) -> None:
    """Weights go through safetensors into a new network, and the module can be copied; the output stays."""
    import torch
    from safetensors.torch import load, save

    state = trial.network.state_dict()
    for name, value in state.items():
        got = f"{type(value).__name__} at {name}"
        trial.wants(isinstance(value, torch.Tensor), "tensors only in the state dict", got)
    try:
        stored = load(save({name: value.contiguous() for name, value in state.items()}))
    except (RuntimeError, ValueError) as error:
        trial.wants(False, "a state dict that safetensors can store", error)
    fresh.load_state_dict(stored)
    trial.wants_same("the same output from a new network with the state dict", y, trial.run(fresh.eval()))
    trial.wants_same("the same output from a deep copy", y, trial.run(copy.deepcopy(trial.network)))


def _check_gradients(trial: _Trial) -> None:
    """A finite gradient that is not all zeros at every trainable parameter."""
    import torch

    y = trial.run()
    (y * torch.randn_like(y)).sum().backward()
    trainable = [(name, p.grad) for name, p in trial.network.named_parameters() if p.requires_grad]
    for name, gradient in trainable:
        reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.ne(0).any())
        got = "none" if gradient is None else "zeros, inf or nan"
        trial.wants(reached, "a gradient at every parameter", f"{got} at {name}")


# Dataset sources.
