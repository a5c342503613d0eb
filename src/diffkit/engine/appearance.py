"""Whether samples look wrong from afar: all black or white, without contrast, burnt out, or of another colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FLAT = 0.1
"""Share of the real images' contrast, below which samples have none."""
DRIFT = 1.0
"""Standard deviations of the real images' pixels, by which a channel's mean may be off."""
BURNT = 0.5
"""Share of the values at their limits, beyond that of the real images."""
DARK, BRIGHT = -0.9, 0.9


@dataclass(frozen=True)
class Appearance:
    """Of images, in units of [-1, 1]: mean and deviation by channel; `contrast`: the deviation within an image, on
    average; `limits`: the share of values that are 0 or 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    contrast: float
    limits: float

    @classmethod
    def of(cls, images: npt.NDArray[np.uint8]) -> Appearance:
        """images [N, H, W, C]."""
        values = images / 127.5 - 1
        at_limits = (images == 0) | (images == 255)
        within = values.std((1, 2)).mean()
        mean, std = values.mean((0, 1, 2)), values.std((0, 1, 2))
        return cls(tuple(mean.tolist()), tuple(std.tolist()), float(within), float(at_limits.mean()))

    def to_record(self) -> dict[str, Any]:
        """For a line of metrics.jsonl."""
        colours = {"colour_mean": list(self.mean), "colour_std": list(self.std)}
        return {**colours, "contrast": self.contrast, "limits": self.limits}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Appearance:
        """The inverse of `to_record`."""
        mean, std = tuple(record["colour_mean"]), tuple(record["colour_std"])
        return cls(mean, std, record["contrast"], record["limits"])


def problems(shown: Appearance, real: Appearance) -> list[str]:
    """What looks wrong with samples beside real images, in words for people; empty where nothing does."""
    if shown.contrast < FLAT * real.contrast:
        if max(shown.mean) < DARK:
            return ["The samples are black."]
        if min(shown.mean) > BRIGHT:
            return ["The samples are white."]
        return [f"The samples are flat: {shown.contrast / real.contrast:.0%} of the contrast of the data."]
    found = []
    if shown.limits > real.limits + BURNT:
        found.append(f"{shown.limits:.0%} of the samples' values are at their limits, {real.limits:.0%} of the data's.")
    off = [abs(a - b) / max(std, 1e-6) for a, b, std in zip(shown.mean, real.mean, real.std, strict=True)]
    if max(off) > DRIFT:
        means = (", ".join(f"{value:+.2f}" for value in each.mean) for each in (shown, real))
        found.append("The samples have another colour than the data: mean {}, not {}.".format(*means))
    return found
