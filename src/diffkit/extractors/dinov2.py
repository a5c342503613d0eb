"""DINOv2, whose features see more of what people see (Stein et al. 2023)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffkit.errors import DiffkitError
from diffkit.extractors.weights import load_weights, unfit

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{name}/dinov2_{name}_pretrain.pth"
NAMES = {
    "vits14": "vit_small_patch14_dinov2",
    "vitb14": "vit_base_patch14_dinov2",
    "vitl14": "vit_large_patch14_dinov2",
}
SIZE, PATCHES, OFFSET = 224, 16, 0.1
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2(*, model: Literal["vits14", "vitb14", "vitl14"] = "vitl14", weights: str = "") -> nn.Module:
    """The class token of DINOv2 (Oquab et al. 2023) at 224 pixels: 1,024 features with vitl14, as FD-DINOv2 has them.

    `weights`: a file of the official ones; by default it is looked for in the cache, then downloaded.
    """
    return DinoV2(model, weights)


class DinoV2(nn.Module):
    """timm's network with the official weights."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: str, weights: str) -> None:
        super().__init__()
        self.distance_names = ("FD-DINOv2", "KD-DINOv2") if model == "vitl14" else (f"FD-{model}", f"KD-{model}")
        try:
            import timm
        except ImportError as error:
            raise DiffkitError(
                "The extractor dinov2 needs timm.", "Install it: pip install 'diffkit[dinov2]'."
            ) from error
        self.network = timm.create_model(
            NAMES[model], pretrained=False, img_size=SIZE, num_classes=0, global_pool="token"
        )
        tensors = load_weights(weights, URL.format(name=model), "dinov2")
        try:
            self.network.load_state_dict(_at_size(tensors))
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise unfit(weights, f"dinov2:model={model}") from error
        self.register_buffer("mean", 255 * torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", 255 * torch.tensor(DEVIATION)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 [B, 3, H, W] -> float32 [B, D]."""
        x = images.float()
        if images.shape[-2:] != (SIZE, SIZE):
            x = functional.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        features: Tensor = self.network((x - self.mean) / self.deviation)
        return features


def _at_size(tensors: dict[str, Any]) -> dict[str, Any]:
    """The position embedding brought from 37 x 37 patches to 16 x 16, by the factor 16.1 / 37 as its authors do."""
    tensors = {name: value for name, value in tensors.items() if name != "mask_token"}
    token, places = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
    side = math.isqrt(places.shape[1])
    picture = places.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (PATCHES + OFFSET) / side
    scaled = functional.interpolate(picture, scale_factor=(factor, factor), mode="bicubic")
    return {**tensors, "pos_embed": torch.cat([token, scaled.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)}
