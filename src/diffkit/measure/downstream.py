"""Are the samples of use? A classifier trained on real images, on samples, and on both, judged on real unseen images.

The first two are the classification accuracy score of Ravuri and Vinyals (2019) and its baseline; the third is data
augmentation, what most people want samples for.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffkit.engine.codec import decode
from diffkit.errors import DiffkitError, ExitCode
from diffkit.measure.estimate import Estimate, around, student95

Pixels = npt.NDArray[np.uint8]

SEEDS, STEPS, BATCH, WIDTH, LEAST_TESTED = 3, 400, 64, 16, 20
WIDEST, LARGEST_SIDE = 128, 32
LR, DECAY = 2e-3, 0.05
ARMS = ("real", "real + samples", "samples")


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [N, H, W, C] and the class index of each, int64 [N]."""

    images: Pixels
    classes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Downstream:
    """Accuracy of each arm on held-out images, and by how much it exceeds that of training on real images."""

    accuracy: list[Estimate]
    gain: list[Estimate]
    tested: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        figures = {key: [each.to_dict() for each in getattr(self, key)] for key in ("accuracy", "gain")}
        return {**figures, "tested": self.tested, "seeds": SEEDS, "steps": STEPS}


def downstream(
    real: Labelled, samples: Labelled, held_out: Labelled, classes: int, device: torch.device, steps: int = STEPS
) -> Generator[tuple[int, int], None, Downstream]:
    """Train each arm with three seeds, for equally many steps; in the mixed one half of every batch is samples.

    Yields (done, total). The intervals hold for other held-out images and for other seeds of the classifier: the
    variance over images of an image's mean correctness, plus that over seeds. Not for other training images or samples.
    Raises DiffkitError if there are fewer than two classes or 20 held-out images.
    """
    if classes < 2:
        raise DiffkitError("A classifier needs two classes at least.", "Prepare images in class folders.")
    if len(held_out.classes) < LEAST_TESTED:
        raise DiffkitError(
            f"{len(held_out.classes)} labelled held-out images are too few to test a classifier on.",
            f"Prepare the images again with a larger --holdout; {LEAST_TESTED} is the least.",
            code=ExitCode.DATA,
        )
    correct: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    sources = {"real": [real], "real + samples": [real, samples], "samples": [samples]}
    for seed in range(SEEDS):
        for number, arm in enumerate(ARMS):
            yield seed * len(ARMS) + number, SEEDS * len(ARMS)
            network = _trained(sources[arm], classes, seed, device, steps)
            correct[arm].append(_correct(network, held_out, device))
    found = {arm: torch.stack(each) for arm, each in correct.items()}
    base = found["real"]
    return Downstream(
        accuracy=[_mean(arm, each) for arm, each in found.items()],
        gain=[_mean(arm, each - base) for arm, each in found.items() if arm != "real"],
        tested=len(held_out.classes),
    )


def _mean(name: str, values: Tensor) -> Estimate:
    """Mean of values [seeds, images], with an interval over both (Satterthwaite 1946 for the degrees of freedom)."""
    seeds, images = values.shape
    over_images = float(values.mean(0).var()) / images
    over_seeds = float(values.mean(1).var()) / seeds
    total = over_images + over_seeds
    spread = over_images**2 / (images - 1) + over_seeds**2 / (seeds - 1)
    return around(name, float(values.mean()), math.sqrt(total), student95(total**2 / spread) if spread else 0.0)


class Classifier(nn.Sequential):
    """A small residual network; images whose shorter side is above 32 pixels are brought down to that."""

    def __init__(self, channels: int, classes: int, side: int) -> None:
        side = min(side, LARGEST_SIDE)
        depth = max(1, min(3, int(math.log2(side / 4))))
        layers: list[nn.Module] = [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        width = WIDTH
        for _ in range(depth):
            layers.append(_Stage(width, min(2 * width, WIDEST)))
            width = min(2 * width, WIDEST)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> logits [B, K]."""
        factor = LARGEST_SIDE / min(x.shape[-2:])
        if factor < 1:
            x = functional.interpolate(x, scale_factor=factor, mode="bilinear", antialias=True)
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits


class _Stage(nn.Module):
    """Half the size, more channels, one residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.body = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return functional.relu(x + self.body(x))


def _trained(sources: list[Labelled], classes: int, seed: int, device: torch.device, steps: int) -> nn.Module:
    """A classifier after `steps` batches, drawn in equal parts from the sources, mirrored and shifted at random."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        _, height, width, channels = sources[0].images.shape
        network = Classifier(channels, classes, min(height, width)).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            images, targets = _batch(sources, generator)
            loss = functional.cross_entropy(network(_varied(images.to(device), generator)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _batch(sources: list[Labelled], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, targets = [], []
    for source in sources:
        chosen = torch.randint(len(source.classes), (BATCH // len(sources),), generator=generator).numpy()
        images.append(torch.from_numpy(source.images[chosen]))
        targets.append(torch.from_numpy(source.classes[chosen]))
    return decode(torch.cat(images)), torch.cat(targets)


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them mirrored, all shifted by up to an eighth."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None].to(images.device), images.flip(-1), images)
    height, width = images.shape[-2:]
    pad_y, pad_x = height // 8, width // 8
    padded = functional.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    top = int(torch.randint(2 * pad_y + 1, (1,), generator=generator))
    left = int(torch.randint(2 * pad_x + 1, (1,), generator=generator))
    return padded[..., top : top + height, left : left + width]


@torch.no_grad()
def _correct(network: nn.Module, held_out: Labelled, device: torch.device) -> Tensor:
    """1 where the classifier is right, else 0: float64 [N]."""
    found = [
        network(decode(torch.from_numpy(held_out.images[start : start + 256])).to(device)).argmax(1).cpu()
        for start in range(0, len(held_out.classes), 256)
    ]
    return (torch.cat(found) == torch.from_numpy(held_out.classes)).double()
