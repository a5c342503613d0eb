"""Checks of samplers, on Gaussian data."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from diffkit.testing.signature import Expect, Options, check_signature, expectations

if TYPE_CHECKING:
    from torch import Tensor

    Sampler = Callable[..., Iterator[Tensor]]

_MEAN, _DEVIATION = 0.3, 0.5


def check_sampler(function: Callable[..., Iterator[Tensor]], /, **options: Any) -> None:
    """A sampler `(denoise, x, sigmas, noise, *, options) -> Iterator[x]`, tried on Gaussian data.

    With the exact denoiser of that data it yields one state of the right shape for each level after the
    first; calls `noise` with Python floats, and `denoise` with such or with a level for each image, above
    s = 0; gives the same images every time, and for one image alone the same as in a batch; changes no
    tensor that it was given, got or handed out; works under and without `inference_mode`, which it must
    not itself hold across a `yield`; and reaches the right mean and deviation (3 %) on fine grids that
    end at 0 and above it.
    """
    expect = expectations(function)
    check_signature(expect, function, 4, options)
    for sigmas in ([80.0, 10.0, 2.0, 0.5, 0.02, 0.0], [80.0, 10.0, 2.0, 0.5], [80.0, 0.0], [10.0, 1.0]):
        _check_sampler_rules(expect, function, sigmas, options)
    for last in (0.0, 0.4):
        _check_sampler_statistics(expect, function, last, options)


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

    def denoise(self, x: Tensor, s: float | Tensor) -> Tensor:
        """The mean of the clean images given x: `mean + v / (v + s^2) * (x - mean)`, v their variance."""
        import torch

        rows = isinstance(s, torch.Tensor) and s.dtype == torch.float64 and s.shape == (len(self.images),)
        wants = "denoise(x, s) with s a Python float, or a float64 tensor with a level for each image"
        self.expect(rows or isinstance(s, float), wants, type(s).__name__)
        levels = torch.as_tensor(s, dtype=torch.float64).reshape(-1, 1, 1, 1)
        self.expect(bool((levels > 0).all()), "denoise(x, s) with s > 0", f"s = {s}")
        wanted = (len(self.images), *self.shape)
        self.expect(tuple(x.shape) == wanted, f"denoise(x, s) with x of shape {wanted}", tuple(x.shape))
        variance, s = _DEVIATION**2, levels.to(x.dtype) if rows else s
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
