# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of GroupNorm with scale, shift and SiLU: an image is read twice and written once, each way.

    y = silu(slope * x + offset),   slope, offset [B, C] from the groups' statistics, weight, bias, scale and shift

Every image is cut into tiles of P positions and C channels. Kernels over tiles read and write images and know channels
only; two small kernels between them, one program for each group of an image, know the groups. There are no atomic
operations: the same input gives the same bits. Arithmetic is float32, whatever the images are.

Wu and He 2018, "Group Normalization"; statistics of tiles are merged as in Chan, Golub and LeVeque 1983.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x_stride, s_position, s_channel, positions, channels, tiles, P: tl.constexpr, C: tl.constexpr):
    """This program's image, tile, channels [C], start of the image, and offsets in it [P, C] with their mask."""
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    position = tile * P + tl.arange(0, P)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    offsets = position[:, None] * s_position + channel[None, :] * s_channel
    return image, tile, channel, image.to(tl.int64) * x_stride, offsets, inside


@triton.jit
def moments(
    x, part, x_stride, s_position, s_channel, positions, channels, tiles, half, P: tl.constexpr, C: tl.constexpr
):
    """Of each tile and channel the mean and the sum of squares about it: part [2, B, tiles, channels]."""
    image, tile, channel, start, offsets, inside = _tile(
        x_stride, s_position, s_channel, positions, channels, tiles, P, C
    )
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(positions - tile * P, P)
    rest = tl.where(inside, value - mean[None, :], 0.0)
    place = part + (image * tiles + tile) * channels + channel
    tl.store(place, mean, mask=channel < channels)
    tl.store(place + half, tl.sum(rest * rest, 0), mask=channel < channels)


@triton.jit
def factors(
    part,
    weight,
    bias,
    modulation,
    statistics,
    factors,
    eps,
    positions,
    channels,
    groups,
    tiles,
    half,
    P: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Of one group of an image: mean and reciprocal deviation [2, B, groups]; slopes and offsets [2, B, channels]."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size, images = channels // groups, tl.num_programs(0) // groups
    channel = group * size + tl.arange(0, D)
    own = tl.arange(0, D) < size
    number = (positions * size).to(tl.float32)
    total = tl.zeros((T, D), tl.float32)
    for first in range(0, tiles, T):
        tile = first + tl.arange(0, T)
        inside = (tile < tiles)[:, None] & own[None, :]
        place = part + (image * tiles + tile)[:, None] * channels + channel[None, :]
        count = tl.minimum(positions - tile * P, P).to(tl.float32)[:, None]
        total += tl.load(place, mask=inside, other=0.0) * count
    mean = tl.sum(tl.sum(total, 1), 0) / number
    total = tl.zeros((T, D), tl.float32)
    for first in range(0, tiles, T):
        tile = first + tl.arange(0, T)
        inside = (tile < tiles)[:, None] & own[None, :]
        place = part + (image * tiles + tile)[:, None] * channels + channel[None, :]
        count = tl.minimum(positions - tile * P, P).to(tl.float32)[:, None]
        apart = tl.load(place, mask=inside, other=0.0) - mean
        squares = tl.load(place + half, mask=inside, other=0.0)
        total += tl.where(inside, squares + count * apart * apart, 0.0)
    scale = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / number + eps)
    tl.store(statistics + tl.program_id(0), mean)
    tl.store(statistics + images * groups + tl.program_id(0), scale)
    slope = tl.load(weight + channel, mask=own, other=0.0).to(tl.float32) * scale
    offset = tl.load(bias + channel, mask=own, other=0.0).to(tl.float32) - mean * slope
    if MODULATED:
        row = modulation + image * 2 * channels
        more = 1.0 + tl.load(row + channel, mask=own, other=0.0).to(tl.float32)
        slope *= more
        offset = offset * more + tl.load(row + channels + channel, mask=own, other=0.0).to(tl.float32)
    place = factors + image * channels + channel
    tl.store(place, slope, mask=own)
    tl.store(place + images * channels, offset, mask=own)


@triton.jit
def apply(
    x,
    y,
    factors,
    x_stride,
    s_position,
    s_channel,
    positions,
    channels,
    tiles,
    SILU: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    image, _, channel, start, offsets, inside = _tile(x_stride, s_position, s_channel, positions, channels, tiles, P, C)
    images = tl.num_programs(0) // tiles
    place = factors + image * channels + channel
    slope = tl.load(place, mask=channel < channels, other=0.0)[None, :]
    offset = tl.load(place + images * channels, mask=channel < channels, other=0.0)[None, :]
    z = slope * tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32) + offset
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + start + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu(value, grad, factors, image, images, channel, channels, SILU: tl.constexpr):
    """The gradient at slope * x + offset, and slope [1, C]."""
    place = factors + image * channels + channel
    slope = tl.load(place, mask=channel < channels, other=0.0)[None, :]
    if SILU:
        offset = tl.load(place + images * channels, mask=channel < channels, other=0.0)[None, :]
        z = slope * value + offset
        gate = tl.sigmoid(z)
        grad *= gate * (1.0 + z * (1.0 - gate))
    return grad, slope


@triton.jit
def _normalised(value, statistics, image, images, channel, channels, groups):
    """x without mean and deviation, and the reciprocal deviation [1, C]."""
    place = statistics + image * groups + channel // (channels // groups)
    mean = tl.load(place, mask=channel < channels, other=0.0)[None, :]
    scale = tl.load(place + images * groups, mask=channel < channels, other=0.0)[None, :]
    return (value - mean) * scale, scale


@triton.jit
def sums(
    x,
    grad_y,
    statistics,
    factors,
    part,
    x_stride,
    s_position,
    s_channel,
    positions,
    channels,
    groups,
    tiles,
    half,
    SILU: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Of each tile and channel the sums of dz and of dz times the normalised x: part [2, B, tiles, channels]."""
    image, tile, channel, start, offsets, inside = _tile(
        x_stride, s_position, s_channel, positions, channels, tiles, P, C
    )
    images = tl.num_programs(0) // tiles
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad, _ = _before_silu(value, grad, factors, image, images, channel, channels, SILU)
    normal, _ = _normalised(value, statistics, image, images, channel, channels, groups)
    place = part + (image * tiles + tile) * channels + channel
    tl.store(place, tl.sum(grad, 0), mask=channel < channels)
    tl.store(place + half, tl.sum(grad * normal, 0), mask=channel < channels)


@triton.jit
def small_gradients(
    part,
    weight,
    bias,
    modulation,
    means,
    grad_affine,
    grad_modulation,
    positions,
    channels,
    groups,
    tiles,
    half,
    T: tl.constexpr,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Of one group of an image: two means for dx [2, B, groups], the image's part of the gradients of weight and bias
    [2, B, channels], and those of scale and shift [B, 2 channels]."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size, images = channels // groups, tl.num_programs(0) // groups
    channel = group * size + tl.arange(0, D)
    own = tl.arange(0, D) < size
    plain = tl.zeros((T, D), tl.float32)
    times = tl.zeros((T, D), tl.float32)
    for first in range(0, tiles, T):
        tile = first + tl.arange(0, T)
        inside = (tile < tiles)[:, None] & own[None, :]
        place = part + (image * tiles + tile)[:, None] * channels + channel[None, :]
        plain += tl.load(place, mask=inside, other=0.0)
        times += tl.load(place + half, mask=inside, other=0.0)
    shift = tl.sum(plain, 0)
    scale = tl.sum(times, 0)
    gain = tl.load(weight + channel, mask=own, other=0.0).to(tl.float32)
    if MODULATED:
        row = image * 2 * channels + channel
        added = tl.load(bias + channel, mask=own, other=0.0).to(tl.float32)
        kind = grad_modulation.dtype.element_ty
        tl.store(grad_modulation + row, (gain * scale + added * shift).to(kind), mask=own)
        tl.store(grad_modulation + row + channels, shift.to(kind), mask=own)
        more = 1.0 + tl.load(modulation + row, mask=own, other=0.0).to(tl.float32)
        scale *= more
        shift *= more
    place = grad_affine + image * channels + channel
    tl.store(place, scale, mask=own)
    tl.store(place + images * channels, shift, mask=own)
    number = (positions * size).to(tl.float32)
    tl.store(means + tl.program_id(0), tl.sum(gain * shift, 0) / number)
    tl.store(means + images * groups + tl.program_id(0), tl.sum(gain * scale, 0) / number)


@triton.jit
def apply_backward(
    x,
    grad_y,
    grad_x,
    statistics,
    factors,
    means,
    x_stride,
    s_position,
    s_channel,
    positions,
    channels,
    groups,
    tiles,
    SILU: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    image, _, channel, start, offsets, inside = _tile(x_stride, s_position, s_channel, positions, channels, tiles, P, C)
    images = tl.num_programs(0) // tiles
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + start + offsets, mask=inside, other=0.0).to(tl.float32)
    grad, slope = _before_silu(value, grad, factors, image, images, channel, channels, SILU)
    normal, scale = _normalised(value, statistics, image, images, channel, channels, groups)
    place = means + image * groups + channel // (channels // groups)
    plain = tl.load(place, mask=channel < channels, other=0.0)[None, :]
    times = tl.load(place + images * groups, mask=channel < channels, other=0.0)[None, :]
    found = slope * grad - scale * (plain + normal * times)
    tl.store(grad_x + start + offsets, found.to(grad_x.dtype.element_ty), mask=inside)
