"""nearest.png: samples, and beside each the training images nearest to it, with their distances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

SHOWN, COLUMNS = 6, 5
TILE, GAP, LINE = 96, 8, 18
INK, FAINT, ALARM = (40, 40, 40), (120, 120, 120), (200, 30, 30)


def chosen(scores: Tensor) -> list[int]:
    """Which samples to show: those with the lowest scores, then others spread evenly over the rest."""
    order = scores.argsort().tolist()
    rest = order[SHOWN:]
    others = [rest[round((i + 0.5) * len(rest) / SHOWN - 0.5)] for i in range(SHOWN)] if len(rest) >= SHOWN else rest
    return order[:SHOWN] + others


def nearest_picture(
    samples: Pixels, found: Pixels, distances: Sequence[Sequence[float]], flagged: Sequence[bool]
) -> Pixels:
    """samples [N, H, W, C], found [N, K, H, W, C] and their distances -> one picture [H', W', 3].

    A flagged sample, one that counts as a copy, has a red frame.
    """
    tiles = np.concatenate([samples[:, None], found], axis=1)
    rows, columns = tiles.shape[:2]
    scale = max(1, TILE // max(tiles.shape[2:4]))
    height, width = tiles.shape[2] * scale, tiles.shape[3] * scale
    halves = -(-rows // 2)
    block = columns * (width + GAP) + 3 * GAP
    sheet = Image.new("RGB", (2 * block + GAP, halves * (height + LINE + GAP) + LINE + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number in range(rows):
        left, top = GAP + number // halves * block, LINE + 2 * GAP + number % halves * (height + LINE + GAP)
        if number % halves == 0:
            draw.text((left, GAP), "sample", INK, font)
            draw.text((left + width + 3 * GAP, GAP), "nearest training images and their distances", INK, font)
        for column in range(columns):
            x = left + column * (width + GAP) + (2 * GAP if column else 0)
            pixels = tiles[number, column]
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, top))
            if column:
                draw.text((x, top + height + 2), f"{distances[number][column - 1]:.2f}", FAINT, font)
        if flagged[number]:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline=ALARM, width=3)
            draw.text((left, top + height + 2), "copy", ALARM, font)
    return np.asarray(sheet)
