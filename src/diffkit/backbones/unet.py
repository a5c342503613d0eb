"""The U-Net: encoder, bottleneck and decoder joined by skip connections, as in DDPM and ADM.

Ho et al. 2020, appendix B; Dhariwal and Nichol 2021, section 3 (scale and shift from the embedding, heads of 64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkit.backbones.norm import GroupNorm, autocast_dtype
from diffkit.backbones.presets import classic_preset, unet_preset
from diffkit.errors import DiffkitError
from diffkit.interfaces import ImageSpec
from diffkit.names import shown

HEAD = 64
MOST_CHANNELS, MOST_BLOCKS = 32_768, 1_000
Resample: TypeAlias = Literal["conv", "plain"]
Skips: TypeAlias = Literal["concat", "add"]


class UNet(nn.Module):
    """See `unet`."""

    def __init__(
        self,
        spec: ImageSpec,
        *,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: int,
        patch: int,
        dropout: float,
        checkpoint: int,
        resample: Resample,
        skips: Skips,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.stride = patch * 2 ** (len(multipliers) - 1)
        self.image_channels = spec.image_channels
        channels = [width * multiplier for multiplier in multipliers]
        sizes = [max(spec.height, spec.width) / patch / 2**level for level in range(len(channels))]
        attends = [size <= attention for size in sizes]
        embedding = 4 * width

        self.embed = Embedding(width, embedding, spec.label_width)
        inputs = spec.channels + (spec.image_channels + 1 if spec.image_channels else 0)
        self.stem = nn.Conv2d(inputs * patch**2, channels[0], 3, padding=1)

        def block(inputs: int, outputs: int, attend: bool, skip: int = 0) -> nn.Module:
            return Block(inputs, outputs, embedding, dropout, attend, skip, skips)

        current, kept = channels[0], [channels[0]]
        self.encoder = nn.ModuleList()
        for out, attend in zip(channels, attends, strict=True):
            shrink: nn.Module | None = None
            if len(self.encoder) and resample == "conv":
                shrink = nn.Conv2d(current, out, 3, stride=2, padding=1)
                current = out
            elif len(self.encoder):
                shrink = nn.AvgPool2d(2)
            kept += [current] if shrink else []
            stage = [block(out if number else current, out, attend) for number in range(blocks)]
            self.encoder.append(Encoder(shrink, stage, recompute=len(self.encoder) < checkpoint))
            kept += [out] * blocks
            current = out

        self.bottleneck = Encoder(None, [block(current, current, attends[-1]), block(current, current, False)])

        self.decoder = nn.ModuleList()
        for out, attend in zip(reversed(channels), reversed(attends), strict=True):
            stage = [block(out if number else current, out, attend, kept.pop()) for number in range(blocks + 1)]
            level = len(channels) - 1 - len(self.decoder)
            grow: nn.Module | None = None
            if level:
                grow = nn.Conv2d(out, out, 3, padding=1) if resample == "conv" else nn.Identity()
            self.decoder.append(Decoder(stage, grow, recompute=level < checkpoint))
            current = out

        # The second place is that of the SiLU in models of before: weights are stored by place.
        last = nn.Conv2d(current, spec.channels * patch**2, 3, padding=1)
        self.head = nn.Sequential(GroupNorm(current, silu=True), nn.Identity(), last)
        zero_(self.head[-1])

    def forward(
        self, x: Tensor, c_noise: Tensor, *, label: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], c_noise [B], label [B, K], image [B, C', H, W] -> [B, C, H, W], any H and W.

        The first and the last convolution and the output are of x's own type, whatever autocast says; all between is
        of autocast's. (On a CPU what comes from the first convolution is left as it is: so models of before have it.)
        """
        height, width = x.shape[-2:]
        x = self._padded(self._with_image(x, image))
        with full_precision(x):
            x = self.stem(F.pixel_unshuffle(x, self.patch))
            embedding = self.embed(c_noise, label)
        dtype = autocast_dtype(x)
        if dtype is not None and x.device.type != "cpu":
            x, embedding = x.to(dtype), embedding.to(dtype)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, embedding, skips)
        x = self.bottleneck(x, embedding, [])
        for stage in self.decoder:
            x = stage(x, embedding, skips)
        with full_precision(x):
            x = F.pixel_shuffle(self.head(x), self.patch)
        return x[..., :height, :width]

    def _with_image(self, x: Tensor, image: Tensor | None) -> Tensor:
        """Beside x, the conditioning image and a channel that says whether there is one."""
        if not self.image_channels:
            return x
        shape = (len(x), self.image_channels + 1, *x.shape[-2:])
        if image is None:
            return torch.cat([x, x.new_zeros(shape)], dim=1)
        return torch.cat([x, image, torch.ones_like(x[:, :1])], dim=1)

    def _padded(self, x: Tensor) -> Tensor:
        down, right = (-x.shape[-2]) % self.stride, (-x.shape[-1]) % self.stride
        return F.pad(x, (0, right, 0, down)) if down or right else x


class Encoder(nn.Module):
    """One resolution on the way down, and the bottleneck: maybe halve, then blocks; every result goes to `skips`."""

    def __init__(self, shrink: nn.Module | None, blocks: Sequence[nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.shrink, self.recompute = shrink, recompute
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        if self.shrink is not None:
            x = self.shrink(x)
            skips.append(x)
        for block in self.blocks:
            x = run(block, self.recompute, x, embedding)
            skips.append(x)
        return x


class Decoder(nn.Module):
    """One resolution on the way up: every block takes a result from `skips`, last in first out; then maybe double."""

    def __init__(self, blocks: Sequence[nn.Module], grow: nn.Module | None, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grow, self.recompute = grow, recompute

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = run(block, self.recompute, x, embedding, skips.pop().to(x.dtype))
        return x if self.grow is None else self.grow(doubled(x))


class Block(nn.Module):
    """Residual block of two convolutions, then attention; the embedding scales and shifts the second normalisation.

    `skip`: channels of what comes from the encoder, put beside x, or by a 1x1 convolution added to it; 0 = nothing.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, attend: bool, skip: int, skips: Skips
    ) -> None:
        super().__init__()
        self.join = nn.Conv2d(skip, inputs, 1) if skip and skips == "add" else None
        inputs += skip if skips == "concat" else 0
        self.norm1, self.conv1 = GroupNorm(inputs, silu=True), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = GroupNorm(outputs, silu=True), zero_(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """`skip`: what comes from the encoder."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1) if self.join is None else x + self.join(skip)
        hidden = self.norm2(self.conv1(self.norm1(x)), self.modulation(embedding))
        result: Tensor = self.attention(self.skip(x) + self.conv2(self.dropout(hidden)))
        return result


class Attention(nn.Module):
    """Residual self-attention over all positions, in heads of at most 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(-(-channels // HEAD), channels + 1) if channels % n == 0)
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        # The fast kernels want each position's channels side by side; those of CUDA take them with gaps between heads.
        qkv = qkv.transpose(-1, -2)
        q, k, v = (qkv if x.is_cuda and qkv.stride(-1) == 1 else qkv.contiguous()).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        result: Tensor = x + self.out(mixed)
        return result


class Embedding(nn.Module):
    """Noise level and label -> one vector [B, width]."""

    frequencies: Tensor

    def __init__(self, features: int, width: int, labels: int) -> None:
        super().__init__()
        # c_noise = log(s) / 4 spans about 3: periods from three times that down to a hundredth.
        frequencies = torch.logspace(math.log10(0.5), math.log10(200), features // 2, device="cpu")
        self.register_buffer("frequencies", frequencies.to(torch.get_default_device()), persistent=False)
        self.noise = nn.Sequential(nn.Linear(features // 2 * 2, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(labels, width, bias=False) if labels else None
        if self.label is not None and not self.label.weight.is_meta:  # where that would load torch's compiler
            nn.init.normal_(self.label.weight)

    def forward(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        angles = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        result = self.noise(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label is not None and label is not None:
            result = result + self.label(label.to(result.dtype))
        return F.silu(result)


def run(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    """The block's result; with `recompute`, its inner activations are found again in the backward pass, not kept."""
    call: Callable[..., Tensor] = block
    if recompute and torch.is_grad_enabled():
        # Only for dropout: the state of a generator cannot be read while a CUDA graph is recorded.
        draws = any(isinstance(each, nn.Dropout) and each.training and each.p > 0 for each in block.modules())
        call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=draws)
    return call(*inputs)


def doubled(x: Tensor) -> Tensor:
    """Every position as two by two: [B, C, H, W] -> [B, C, 2 H, 2 W], in x's layout.

    On a CPU torch's interpolation is several times faster; on CUDA autocast runs it in float32.
    """
    return repeated(x) if x.is_cuda else F.interpolate(x, scale_factor=2.0, mode="nearest")


def repeated(x: Tensor) -> Tensor:
    """The same by broadcasting, which is a copy, and a sum of four on the way back."""
    images, channels, height, width = x.shape
    if x.is_contiguous():
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return x.reshape(images, channels, 2 * height, 2 * width)
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return x.reshape(images, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast inside (the meta device, on which shapes are planned, has none to switch off)."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def zero_(layer: Any) -> Any:
    """Zero the weights: a residual branch starts as nothing, an output as zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def unet(
    spec: ImageSpec,
    *,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    blocks: int = 2,
    attention: int = 16,
    patch: int = 1,
    dropout: float = 0.0,
    checkpoint: int = 0,
    resample: Resample = "conv",
    skips: Skips = "concat",
) -> nn.Module:
    """The U-Net of DDPM and ADM; its presets are of a leaner kind, which gets further in the same time.

    width: channels of the first stage; multipliers: of `width`, one for each resolution, each half the one before;
    blocks: residual blocks per resolution in the encoder (one more in the decoder); attention: self-attention where
    the longer side is at most this many positions (0 = nowhere); patch: the stem folds patch x patch pixels into
    channels, which makes every layer patch^2 cheaper; dropout: share of activations dropped inside the blocks;
    checkpoint: at so many resolutions, from the highest, activations are computed again in the backward pass instead of
    kept (Chen et al. 2016): less memory, the same result, up to a third more time; resample: between resolutions by
    convolutions ("conv") or by mean and repetition alone ("plain"; Karras et al. 2024, appendix B); skips: what comes
    from the encoder is put beside the decoder's channels ("concat"), or a 1x1 convolution of it added to them ("add").
    """
    if width < 4 or blocks < 1 or patch < 1 or not multipliers or min(multipliers) < 1 or checkpoint < 0:
        raise DiffkitError(
            f"No U-Net has width={width}, multipliers={list(multipliers)}, blocks={blocks}, patch={patch}, "
            f"checkpoint={checkpoint}.",
            "width is at least 4, checkpoint at least 0, the others at least 1.",
        )
    if max(width, *(width * each for each in multipliers)) > MOST_CHANNELS or blocks * len(multipliers) > MOST_BLOCKS:
        raise DiffkitError(
            f"A U-Net of width={shown(width)}, multipliers={shown(list(multipliers))}, blocks={shown(blocks)} is too "
            "large.",
            f"At most {MOST_CHANNELS:,} channels and {MOST_BLOCKS} blocks.",
        )
    if not 0 <= dropout < 1:
        raise DiffkitError(f"dropout={dropout} is no share.", "Choose 0 <= dropout < 1.")
    return UNet(
        spec,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        patch=patch,
        dropout=dropout,
        checkpoint=checkpoint,
        resample=resample,
        skips=skips,
    )


def unet_classic(
    spec: ImageSpec,
    *,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    blocks: int = 2,
    attention: int = 16,
    patch: int = 1,
    dropout: float = 0.0,
    checkpoint: int = 0,
) -> nn.Module:
    """The U-Net of DDPM and ADM as published, presets included: full resolution, convolutions in between.

    Options: see `unet`.
    """
    return unet(
        spec,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        patch=patch,
        dropout=dropout,
        checkpoint=checkpoint,
    )


unet.presets = unet_preset  # type: ignore[attr-defined]
unet_classic.presets = classic_preset  # type: ignore[attr-defined]
