"""What is strange about the pixels of a data set as a whole, though each image is sound by itself."""

from __future__ import annotations

import math

from diffkit.datasets.deep import WHITE_LEVEL
from diffkit.engine.shards import Moments

_DARK = (WHITE_LEVEL + 1) // 4
_FLAT = 8.0


def remarks(deep: int, peak: int, moments: Moments) -> tuple[str, ...]:
    """Sentences for the user.

    deep: how many images have 16-bit samples; peak: the largest sample of them all; moments: of all stored values.
    """
    found = []
    if deep and peak < _DARK:
        bits = max(1, peak.bit_length())
        found.append(
            f"{_images(deep)} with 16-bit samples: none is larger than {peak:,} of {WHITE_LEVEL:,}, so at most "
            f"{peak * 255 // WHITE_LEVEL} of 255 is stored. If these are {bits}-bit values, prepare again with "
            f"--white-level {2**bits - 1}."
        )
    means = [127.5 * (mean + 1) for mean in moments.mean()]
    # The deviation of all values of a channel, within and between images; an image of noise has about 74.
    deviations = [127.5 * std for std in moments.std()]
    if max(deviations) < _FLAT:
        mean = math.fsum(means) / len(means)
        shade = "black" if mean < 16 else "white" if mean > 239 else "of one colour"
        found.append(
            f"The images are nearly {shade}: mean {_listed(means)}, standard deviation {_listed(deviations)}, of 255. "
            "Look at some of them before training."
        )
    return tuple(found)


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _listed(values: list[float]) -> str:
    return "/".join(f"{value:.1f}" for value in values)
