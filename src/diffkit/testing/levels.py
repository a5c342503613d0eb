"""Checks of functions of the noise level: schedules and prediction types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from diffkit.interfaces import Coefficients
from diffkit.testing.signature import Expect, Options, check_signature, expectations, required_options

if TYPE_CHECKING:
    from torch import Tensor

    Sampler = Callable[..., Iterator[Tensor]]

_FROM_HOST = {"sigma_data": 0.5}


def check_schedule(function: Callable[..., Tensor], /, **options: Any) -> None:
    """A noise schedule `(t, *, options) -> s`: float64, finite, positive, strictly increasing on (0, 1).

    t runs over 100,001 even steps from 1e-6 to 1 - 1e-6. Each value must depend on its own t alone and be the
    same at every call, and t must come back as it was.
    """
    import torch

    expect = expectations(function)
    check_signature(expect, function, 1, options)
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

    expect = expectations(function)
    check_signature(expect, function, 1, options, required=_FROM_HOST)
    options = {**{name: _FROM_HOST[name] for name in required_options(function) & set(_FROM_HOST)}, **options}
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
