"""Moving pictures: GIF, MP4, or a folder of frames."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffkit import durable
from diffkit.engine.pictures import png
from diffkit.engine.store import Pixels
from diffkit.errors import DiffkitError, ExitCode

LEAST_SIDE = 128


def save_film(path: Path, frames: Sequence[Pixels], *, per_second: float, hold: float = 0.0) -> None:
    """Frames uint8 [H, W, C] to path.gif, path.mp4, or, without a suffix, a folder of PNG files.

    The last frame stays for `hold` seconds more. Small ones are enlarged, unsmoothed. Raises DiffkitError for another
    suffix, or where MP4 needs a library that is not installed.
    """
    factor = max(1, -(-LEAST_SIDE // max(frames[0].shape[:2])))
    large = [frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in frames]
    if path.suffix == ".gif":
        durable.write_bytes(path, _gif(large, per_second, hold))
    elif path.suffix == ".mp4":
        _mp4(path, [*large, *[large[-1]] * round(hold * per_second)], per_second)
    elif not path.suffix:
        with durable.new_folder(path) as folder:
            for number, frame in enumerate(frames):
                durable.write_bytes(folder / f"{number:04d}.png", png(frame))
    else:
        raise DiffkitError(
            f"{path.suffix} is no kind of film.", "Name it .gif or .mp4, or give a folder for its frames."
        )


def check_film(path: Path) -> None:
    """Raises DiffkitError now for what `save_film` could not write later."""
    if path.suffix not in {"", ".gif", ".mp4"}:
        raise DiffkitError(
            f"{path.suffix} is no kind of film.", "Name it .gif or .mp4, or give a folder for its frames."
        )
    if path.suffix == ".mp4":
        _ffmpeg()


def _gif(frames: Sequence[Pixels], per_second: float, hold: float) -> bytes:
    images = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    # One palette for all frames, from all of them, or colours would flicker.
    sample = np.concatenate(
        [np.asarray(image.convert("RGB"))[::2, ::2] for image in images[:: max(1, len(images) // 16)]]
    )
    palette = Image.fromarray(sample).quantize(256)
    reduced = [image.convert("RGB").quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    durations = [round(1000 / per_second)] * len(frames)
    durations[-1] += round(1000 * hold)
    file = io.BytesIO()
    reduced[0].save(file, "GIF", save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=False)
    return file.getvalue()


def _mp4(path: Path, frames: Sequence[Pixels], per_second: float) -> None:
    height, width = (side + side % 2 for side in frames[0].shape[:2])  # H.264 wants even sides
    writer = _ffmpeg().write_frames(
        str(path), (width, height), fps=per_second, quality=8, macro_block_size=1, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        colour = frame.repeat(3, axis=2) if frame.shape[-1] == 1 else frame
        edge = ((0, height - colour.shape[0]), (0, width - colour.shape[1]), (0, 0))
        writer.send(np.ascontiguousarray(np.pad(colour, edge, mode="edge")))
    writer.close()


def _ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise DiffkitError(
            "MP4 films need a library that is not installed here.",
            "pip install 'diffkit[video]', or name the film .gif.",
            code=ExitCode.MACHINE,
        ) from error
    return imageio_ffmpeg
