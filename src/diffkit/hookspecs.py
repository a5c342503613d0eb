"""The hooks of diffkit: what a plugin may add.

A plugin is any installed distribution with an entry point in the group `diffkit`:

    [project.entry-points.diffkit]
    my-plugin = "my_package.module"

whose module defines some of these hooks with `from diffkit import hookimpl`. Each returns a dictionary from a part's
name to the function itself or to an import string `"module:function"`; import strings keep `diffkit --help` and
`diffkit plugins list` fast, since nothing is imported until the part is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from diffkit.interfaces import (
        Backbone,
        DatasetSource,
        Extractor,
        Prediction,
        Sampler,
        Schedule,
        Task,
        Tracker,
        Weighting,
    )

hookspec = pluggy.HookspecMarker("diffkit")


@hookspec
def schedules() -> dict[str, Schedule | str]:
    """Noise schedules, `(t, *, options) -> s`.

    t is a float64 tensor strictly inside (0, 1); s, the noise-to-signal ratio, must be finite, positive and
    increasing in t. Only the shape matters: diffkit restricts it to the model's own range of s. As a quantile
    function it is the density of training noise levels; over a grid of t it is a sampling grid.
    """
    raise NotImplementedError


@hookspec
def predictions() -> dict[str, Prediction | str]:
    """Prediction types, `(s, *, options) -> Coefficients(skip, out, inp)`.

    The denoiser is `skip * x + out * network(inp * x, log(s) / 4)`. An option called `sigma_data` is filled in
    from the data set unless the user gives it.
    """
    raise NotImplementedError


@hookspec
def samplers() -> dict[str, Sampler | str]:
    """Samplers, `(denoise, x, sigmas, noise, *, options) -> Iterator[x]`.

    x [B, C, H, W] starts at noise level sigmas[0]; the sampler yields x at sigmas[1], sigmas[2], ... The list is
    strictly monotone and usually falls to 0; it may end above 0, and it rises when an image is inverted.
    """
    raise NotImplementedError


@hookspec
def weightings() -> dict[str, Weighting | str]:
    """Loss weightings, `(s, density, *, options) -> weights` of the squared error of the clean estimate.

    All float64 [B]. `density` is that of the training's noise levels in log s. Only ratios matter: diffkit scales the
    weights to a mean of 1 over the training.
    """
    raise NotImplementedError


@hookspec
def tasks() -> dict[str, Task | str]:
    """Image-to-image tasks, `(images, draw, mask, *, options) -> conditioning image [B, C', H, W]`.

    `images` [B, C, H, W] in [-1, 1] are the paired inputs of the data set if it has some, else its own images; when
    sampling, the user's. `draw(n)` gives [B, n] numbers in (0, 1), the same for an image whatever its company. `mask`
    is [B, 1, H, W] or None, and given only to a function whose attribute `takes_mask` is true; `needs_pairs` says that
    it makes no sense without pairs.
    """
    raise NotImplementedError


@hookspec
def backbones() -> dict[str, Backbone | str]:
    """Networks, `(spec, *, options) -> nn.Module`.

    `forward(x [B, C, H, W], c_noise [B], **condition) -> [B, C, H, W]`, any H and W. Conditions come as keyword
    tensors: `label [B, K]` where the spec has classes, `image [B, C', H, W]` where it has image channels.
    """
    raise NotImplementedError


@hookspec
def datasets() -> dict[str, DatasetSource | str]:
    """Dataset sources, `(path, *, options) -> Iterator[Example]`: where `diffkit prepare` reads images from."""
    raise NotImplementedError


@hookspec
def extractors() -> dict[str, Extractor | str]:
    """Feature extractors, `(*, options) -> nn.Module`: what `diffkit evaluate` looks at images with.

    `forward(images uint8 [B, 3, H, W]) -> float32 [B, D]`, for any H and W: the module resizes and normalises as its
    weights expect. It never downloads while it is called; the function that builds it may.
    """
    raise NotImplementedError


@hookspec
def trackers() -> dict[str, Tracker | str]:
    """Trackers, `(run, *, options) -> context manager of log(images_seen, figures, pictures)`: who else is told.

    Write it as a generator under `contextlib.contextmanager` that yields `log`. `figures` are numbers by name,
    `pictures` paths of PNG files by name. What goes wrong in `log` costs the tracker, never the training.
    """
    raise NotImplementedError
