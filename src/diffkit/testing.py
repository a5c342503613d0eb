"""Checks for parts: what a plugin's own tests call, and what diffkit's own parts pass.

Each check takes the function itself, then its options, and raises AssertionError with what was wanted and
what came. Nothing here needs a GPU, a data set or pytest; a check takes seconds and leaves torch's global
random state as it was.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.interfaces import Coefficients, Example, ImageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    Expect = Callable[[bool, str, object], None]
    Options = dict[str, Any]
    Sampler = Callable[..., Iterator[Tensor]]

__all__ = ["check_backbone", "check_dataset", "check_prediction", "check_sampler", "check_schedule"]

_MEAN, _DEVIATION = 0.3, 0.5
_FROM_HOST = {"sigma_data": 0.5}


def check_schedule(function: Callable[..., Tensor], /, **options: Any) -> None:
    """A noise schedule `(t, *, options) -> s`: float64, finite, positive, strictly increasing on (0, 1).

    t runs over 100,001 even steps from 1e-6 to 1 - 1e-6. Each value must depend on its own t alone and be the
    same at every call, and t must come back as it was.
    """
    import torch

    expect = _expectations(function)
    _check_signature(expect, function, 1, options)
    t = torch.linspace(1e-6, 1 - 1e-6, 100_001, dtype=torch.float64)
    s = function(t.clone(), **options)
    _check_levels(expect, "s", s, t)
    expect(bool((s > 0).all()), "s > 0 everywhere", f"{_at(t, s, ~(s > 0))}")
    rising = s.diff() > 0
    expect(bool(rising.all()), "s strictly increasing in t", f"no rise after {_at(t[:-1], s[:-1], ~rising)}")
    _check_elementwise(expect, "s", lambda levels: function(levels, **options), t)


def check_prediction(function: Callable[..., Coefficients], /, **options: Any) -> None:
    """A prediction type `(s, *, options) -> Coefficients(skip, out, inp)` at s from 0.002 to 320.

    Float64 tensors of the shape of s, finite, out not 0, inp above 0; the network that hits its target gives
    back the clean image; for clean images and noise of unit variance that target stays below an RMS of 1,000,
    and what the network is given has a variance between 1e-3 and 1e3. A required option `sigma_data` is 0.5
    unless given.
    """
    import torch

    expect = _expectations(function)
    _check_signature(expect, function, 1, options, required=_FROM_HOST)
    options = {**{name: _FROM_HOST[name] for name in _required(function) & set(_FROM_HOST)}, **options}
    s = torch.logspace(math.log10(0.002), math.log10(320), 201, dtype=torch.float64)
    found = function(s.clone(), **options)
    expect(isinstance(found, Coefficients), "Coefficients(skip, out, inp)", type(found).__name__)
    for name, value in zip(Coefficients._fields, found, strict=True):
        _check_levels(expect, name, value, s)
        _check_elementwise(expect, name, _one_of(function, name, options), s)
    skip, out, inp = found
    expect(bool((out != 0).all()), "out != 0 everywhere", _at(s, out, out == 0))
    expect(bool((inp > 0).all()), "inp > 0 everywhere", _at(s, inp, ~(inp > 0)))
    _check_targets(expect, s[:, None], skip[:, None], out[:, None], inp[:, None])


def check_sampler(function: Callable[..., Iterator[Tensor]], /, **options: Any) -> None:
    """A sampler `(denoise, x, sigmas, noise, *, options) -> Iterator[x]`, tried on Gaussian data.

    With the exact denoiser of that data it yields one state of the right shape for each level after the
    first; calls `denoise` and `noise` with Python floats, `denoise` above s = 0; gives the same images every
    time, and for one image alone the same as in a batch; changes no tensor that it was given, got or handed
    out; works under and without `inference_mode`, which it must not itself hold across a `yield`; and reaches
    the right mean and deviation (3 %) on fine grids that end at 0 and above it.
    """
    expect = _expectations(function)
    _check_signature(expect, function, 4, options)
    for sigmas in ([80.0, 10.0, 2.0, 0.5, 0.02, 0.0], [80.0, 10.0, 2.0, 0.5], [80.0, 0.0], [10.0, 1.0]):
        _check_sampler_rules(expect, function, sigmas, options)
    for last in (0.0, 0.4):
        _check_sampler_statistics(expect, function, last, options)


def check_backbone(function: Callable[..., nn.Module], /, **options: Any) -> None:
    """A backbone `(spec, *, options) -> nn.Module`, `forward(x, c_noise, **condition) -> [B, C, H, W]`.

    For gray and colour, sides that are not multiples of anything, classes and a conditioning image: the
    output is finite, float32 and of the right shape; an image does not depend on its neighbours in the batch;
    the condition counts; a label of zeros is the same as none; a gradient reaches every parameter; the state
    dictionary goes through safetensors and back; the module can be copied.
    """
    import torch

    expect = _expectations(function)
    _check_signature(expect, function, 1, options)
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


def check_dataset(function: Callable[..., Iterator[Example]], path: str | Path, /, **options: Any) -> None:
    """A dataset source `(path, *, options) -> Iterator[Example]`, on a small data set of yours at `path`.

    At least one Example; the same list twice; ids all different (or None); images that are Pillow images,
    uint8 arrays, paths of existing files or functions that return a Pillow image; labels that are strings or
    None. Every image is looked at, so keep the data set small and free of damaged files.
    """
    expect = _expectations(function)
    _check_signature(expect, function, 1, options)
    first = [_fingerprint(expect, example) for example in _examples(expect, function, path, options)]
    expect(bool(first), "at least one Example", "none")
    ids = [record[0] for record in first if record[0] is not None]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    expect(not repeated, "an id of its own for each Example", f"{repeated[:3]} more than once")
    second = [_fingerprint(expect, example) for example in _examples(expect, function, path, options)]
    expect(len(first) == len(second), f"{len(first)} examples again at the second call", len(second))
    for position, (one, other) in enumerate(zip(first, second, strict=True)):
        expect(one == other, f"example {position} to be the same at every call: {one}", other)


# What every kind shares: messages and signatures.


def _expectations(function: Callable[..., Any]) -> Expect:
    """`expect(true, wanted, got)` for one part, named in its messages."""
    name = getattr(function, "__name__", repr(function))

    def expect(condition: bool, wanted: str, got: object) -> None:
        if not condition:
            raise AssertionError(f"{name}: wanted {wanted}, got {got}.")

    return expect


def _check_signature(
    expect: Expect,
    function: Callable[..., Any],
    positional: int,
    options: Options,
    required: Iterable[str] = (),
) -> None:
    """The contract's positional parameters, then options: keyword-only, annotated, with a default.

    An option may lack a default if the host fills it in (`required`) or if this check was given it.
    """
    parameters = inspect.signature(function).parameters.values()
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    listed = f"{len(first)} ({', '.join(p.name for p in first)})"
    wanted = f"{positional} positional parameters before the keyword-only options"
    expect(len(first) == positional, wanted, listed)
    for p in parameters:
        expect(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD), "every option by its own name", str(p))
        if p.kind is p.KEYWORD_ONLY:
            expect(p.annotation is not p.empty, f"a type annotation on option '{p.name}'", "none")
            known = p.default is not p.empty or p.name in required or p.name in options
            expect(known, f"a default for option '{p.name}'", "none")
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        expect(name in names, f"one of the options {names}", f"'{name}'")


def _required(function: Callable[..., Any]) -> set[str]:
    """Names of the keyword-only parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


# Schedules and predictions.


def _one_of(function: Callable[..., Coefficients], name: str, options: Options) -> Callable[[Tensor], Tensor]:
    """One of the three coefficients, as a function of s."""

    def coefficient(s: Tensor) -> Tensor:
        value: Tensor = getattr(function(s, **options), name)
        return value

    return coefficient


def _at(t: Tensor, values: Tensor, wrong: Tensor) -> str:
    """The first wrong value and where it is: `5.0 at 0.25`."""
    index = int(wrong.nonzero()[0]) if bool(wrong.any()) else 0
    return f"{values[index].item():.9g} at {t[index].item():.9g}"


def _check_levels(expect: Expect, what: str, value: Any, levels: Tensor) -> None:
    """A finite float64 tensor of the shape of `levels`."""
    import torch

    expect(isinstance(value, torch.Tensor), f"{what} as a tensor", type(value).__name__)
    expect(value.dtype == torch.float64, f"{what} in torch.float64", value.dtype)
    shape = tuple(levels.shape)
    expect(tuple(value.shape) == shape, f"{what} of the shape of the input, {shape}", tuple(value.shape))
    where = _at(levels.flatten(), value.flatten(), ~value.isfinite().flatten())
    expect(bool(value.isfinite().all()), f"{what} finite everywhere", where)


def _check_elementwise(expect: Expect, what: str, function: Callable[[Tensor], Tensor], levels: Tensor) -> None:
    """The same number from the same number, at every call, in any company or shape; the input left alone."""
    import torch

    given = levels.clone()
    reference = function(given)
    expect(torch.equal(given, levels), f"the input of {what} left as it was", "it was changed in place")
    again = function(levels.clone())
    expect(torch.equal(reference, again), f"the same {what} at every call", "two different answers")
    table = levels[:6].reshape(2, 3).clone()
    _check_levels(expect, what, function(table), table)
    middle = levels[levels.numel() // 2].clone()
    alone, expected = function(middle.clone()), reference[levels.numel() // 2]
    _check_levels(expect, what, alone, middle)
    wanted = f"{what} = {expected.item():.12g} at {middle.item():.6g} alone, as among others"
    expect(torch.allclose(alone, expected, rtol=1e-12, atol=0.0), wanted, alone.item())


def _check_targets(expect: Expect, s: Tensor, skip: Tensor, out: Tensor, inp: Tensor) -> None:
    """The identity `clean = skip * x + out * target`, and targets and inputs that a network can handle."""
    import torch

    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4096, dtype=torch.float64, generator=generator)
    x = clean + s * noise
    target = (clean - skip * x) / out
    error = (skip * x + out * target - clean).abs().amax(1)
    wanted = "clean = skip * x + out * target within 1e-9"
    expect(bool((error < 1e-9).all()), wanted, _at(s[:, 0], error, error >= 1e-9))
    size = target.square().mean(1).sqrt()
    expect(bool((size < 1e3).all()), "a target of RMS below 1000", _at(s[:, 0], size, size >= 1e3))
    variance = (inp * x).var(1)
    wrong = (variance <= 1e-3) | (variance >= 1e3)
    expect(not bool(wrong.any()), "inp * x of variance between 1e-3 and 1e3", _at(s[:, 0], variance, wrong))


# Samplers.


class _Gaussian:
    """Images of independent Gaussian pixels, their exact denoiser, and noise keyed by image and interval.

    It remembers every tensor that it handed out, to show later that none was changed. With `statistics` it does
    not, and each draw is given mean 0 and variance 1 exactly.
    """

    def __init__(
        self, expect: Expect, images: Sequence[int], shape: tuple[int, int, int], *, statistics: bool = False
    ) -> None:
        self.expect, self.images, self.shape, self.statistics = expect, images, shape, statistics
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        if not self.statistics:
            self.seen.append((name, tensor, tensor.clone()))
        return tensor

    def randn(self, *key: float) -> Tensor:
        """[B, C, H, W], a function of (image, key) alone."""
        import torch

        # A hash, since manual_seed looks at 32 bits only.
        seeds = [zlib.crc32(struct.pack(f"<{len(key) + 1}d", image, *key)) for image in self.images]
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        if self.statistics:
            draws = [(draw - draw.mean()) / draw.std(correction=0) for draw in draws]
        return torch.stack(draws)

    def denoise(self, x: Tensor, s: float) -> Tensor:
        """The mean of the clean images given x: `mean + v / (v + s^2) * (x - mean)`, v their variance."""
        self.expect(isinstance(s, float), "denoise(x, s) with s a Python float", type(s).__name__)
        self.expect(s > 0, "denoise(x, s) with s > 0", f"s = {s}")
        wanted = (len(self.images), *self.shape)
        self.expect(tuple(x.shape) == wanted, f"denoise(x, s) with x of shape {wanted}", tuple(x.shape))
        variance = _DEVIATION**2
        return self.keep("denoise's answer", _MEAN + variance / (variance + s * s) * (x - _MEAN))

    def noise(self, s: float, s_next: float) -> Tensor:
        for value in (s, s_next):
            self.expect(isinstance(value, float), "noise(s, s_next) with Python floats", type(value).__name__)
        return self.keep("noise's answer", self.randn(s, s_next))

    def states(self, function: Sampler, sigmas: Sequence[float], options: Options) -> Iterator[Tensor]:
        """The sampler's states from pure noise at sigmas[0], each checked as it comes."""
        import torch

        x = self.keep("the x it started from", self.randn(sigmas[0]) * sigmas[0])
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        for state in function(self.denoise, x, list(sigmas), self.noise, **options):
            now = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
            self.expect(now == modes, "inference_mode and no_grad not held across a yield", "a changed mode")
            self.expect(state.shape == x.shape, f"states of shape {tuple(x.shape)}", tuple(state.shape))
            self.expect(state.dtype == torch.float32, "float32 states from a float32 x", state.dtype)
            self.expect(bool(state.isfinite().all()), f"finite states on the grid {sigmas}", "inf or nan")
            yield self.keep("a state it had yielded", state)

    def check_unchanged(self) -> None:
        import torch

        for name, tensor, before in self.seen:
            self.expect(torch.equal(tensor, before), f"{name} left as it was", "it was changed in place")


def _check_sampler_rules(expect: Expect, function: Sampler, sigmas: Sequence[float], options: Options) -> None:
    """On three small images: the number of states, no change in place, determinism, no company kept."""
    import torch

    where = f"on the grid {sigmas}"

    def run(images: Sequence[int]) -> list[Tensor]:
        data = _Gaussian(expect, images, (2, 4, 5))
        states = list(data.states(function, sigmas, options))
        data.check_unchanged()
        return states

    def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))

    states = run((0, 1, 2))
    expect(len(states) == len(sigmas) - 1, f"{len(sigmas) - 1} states {where}", len(states))
    gap = difference(states, run((0, 1, 2)))
    expect(gap == 0, f"the same states from the same x and noise {where}", f"a difference of {gap:.3g}")
    with torch.inference_mode():
        gap = difference(states, run((0, 1, 2)))
    expect(gap < 1e-5, f"the same states under inference_mode {where}", f"a difference of {gap:.3g}")
    gap = difference([state[1:2] for state in states], run((1,)))
    expect(gap < 1e-4, f"image 1 alone as in a batch of 3 {where}", f"a difference of {gap:.3g}")


def _check_sampler_statistics(expect: Expect, function: Sampler, last: float, options: Options) -> None:
    """400 log-linear steps down to `last` give the mean and deviation of the data, noised to that level."""
    import torch

    end = max(last, 0.002)
    sigmas = torch.logspace(math.log10(80), math.log10(end), 401, dtype=torch.float64).tolist()
    sigmas = sigmas if last else [*sigmas, 0.0]
    data = _Gaussian(expect, (0,), (1, 128, 128), statistics=True)
    for state in data.states(function, sigmas, options):
        final = state
    mean, deviation = float(final.mean()), float(final.std())
    wanted = math.hypot(_DEVIATION, sigmas[-1])
    where = f"after {len(sigmas) - 1} steps to s = {last} on Gaussian data"
    expect(abs(mean - _MEAN) < 0.03 * wanted, f"a mean of {_MEAN} {where}", f"{mean:.4f}")
    expect(abs(deviation / wanted - 1) < 0.03, f"a deviation of {wanted:.4f} {where}", f"{deviation:.4f}")


# Backbones.


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


def _examples(
    expect: Expect, function: Callable[..., Iterator[Example]], path: str | Path, options: Options
) -> Iterator[Example]:
    """What the source yields, each one an Example with an id and a label of the right type."""
    found = function(str(path), **options)
    expect(isinstance(found, Iterator), "an iterator (a generator function)", type(found).__name__)
    for example in found:
        expect(isinstance(example, Example), "diffkit.interfaces.Example", type(example).__name__)
        for name, value in (("id", example.id), ("label", example.label)):
            expect(value is None or isinstance(value, str), f"a string or None as {name}", repr(value))
        yield example


def _fingerprint(expect: Expect, example: Example) -> tuple[str | None, str | None, str, str | None]:
    """What must be the same at every call: id, label, and a word for each image."""
    paired = None if example.input is None else _image_word(expect, example.input)
    return (example.id, example.label, _image_word(expect, example.image), paired)


def _image_word(expect: Expect, image: Any) -> str:
    """A short description that changes when the image does."""
    import numpy as np
    from PIL import Image

    if isinstance(image, Path):
        expect(image.is_file(), "the path of an existing file", image)
        return f"file {image}"
    if callable(image) and not isinstance(image, Image.Image):
        image = image()
        expect(isinstance(image, Image.Image), "a function that returns a Pillow image", type(image).__name__)
    if isinstance(image, np.ndarray):
        shape = image.shape
        expect(image.dtype == np.uint8, "an image array in uint8", image.dtype)
        right = image.ndim == 2 or (image.ndim == 3 and shape[2] in (1, 3))
        expect(right and image.size > 0, "an image array [H, W], [H, W, 1] or [H, W, 3]", shape)
        return f"array {shape} {_digest(image.tobytes())}"
    kinds = "a Pillow image, a uint8 array, a Path or a function returning a Pillow image"
    expect(isinstance(image, Image.Image), kinds, type(image).__name__)
    return f"image {image.mode} {image.size} {_digest(image.tobytes())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
