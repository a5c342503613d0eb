"""Inception-v3 as FID has always used it."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from diffkit.errors import DiffkitError
from diffkit.extractors.weights import load_weights, unfit

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def inception(*, weights: str = "") -> nn.Module:
    """2,048 features of Inception-v3 (Szegedy et al. 2015), in torch-fidelity's port: published FIDs compare.

    `weights`: a file; by default it is looked for in the cache, then downloaded.
    """
    return Inception(weights)


class Inception(nn.Module):
    """torch-fidelity's network, which scales images as TensorFlow 1 did."""

    distance_names = ("FID", "KID")

    def __init__(self, weights: str) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise DiffkitError(
                "The extractor inception needs torch-fidelity.", "Install it: pip install 'diffkit[fid]'."
            ) from error
        # It would unpickle any file: it gets one that was written anew, with tensors alone.
        clean = io.BytesIO()
        torch.save(load_weights(weights, URL, "inception"), clean)
        clean.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=clean)
        except (RuntimeError, TypeError) as error:
            raise unfit(weights, "inception") from error
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 [B, 3, H, W] -> float32 [B, 2048]."""
        features: Tensor = self.network(images)[0]
        return features
