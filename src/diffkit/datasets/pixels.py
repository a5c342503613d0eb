"""The samples of an opened image, whatever their depth and colour space, as plain 8-bit gray or sRGB.

Large images are converted a band of rows at a time, so that the decoded image is the only large thing in memory.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

from diffkit.datasets.deep import WHITE_LEVEL, Depth, depth_of, low_bytes
from diffkit.datasets.imagefile import WHITE, Color, RejectedImage, rejecting

BAND = 2**20
_MAX_SCANS = 200
_GRAY_STEP = {"1": 255, "L;2": 85, "L;4": 17}
_DARK, _ALIKE = 55, 16
"""A dark gray, and by how much a profile that calls itself sRGB may change it."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]


@dataclass
class Samples:
    """A decoded image as it is stored: `orientation` says how it has to be turned to be upright.

    `depth` describes samples of 16 bits (None = 8 bits), `low` holds their low bytes where `image` has the high ones.
    `transparent` is the sample value of PNG files that means transparent. `peak` is the largest 16-bit sample of the
    rows converted so far, 0 for 8-bit images.
    """

    image: Image.Image
    depth: Depth | None
    low: Image.Image | None
    transparent: tuple[int, ...] | None
    orientation: int
    peak: int = 0

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height once turned."""
        width, height = self.image.size
        return (height, width) if self.orientation > 4 else (width, height)

    def whole(self, channels: int, background: Color = WHITE) -> Image.Image:
        """The upright image, in full size, as "RGB" (`channels` 3) or "L" (1)."""
        return self.resized(self.upright_size, (0, 0, *self.upright_size), channels, background)

    def resized(self, size: tuple[int, int], box: Box, channels: int, background: Color = WHITE) -> Image.Image:
        """The part `box` of the upright image at `size`, as "RGB" (`channels` 3) or "L" (1).

        The same, bit for bit, as converting the whole and resizing it: Pillow scales along the rows first, rounds, and
        then along the columns, so the rows may come in bands.
        """
        left, top, right, bottom = self._stored(box)
        across, down = size[::-1] if self.orientation > 4 else size
        width, height = self.image.size
        rows = max(1, BAND // width)
        if rows >= height:
            small = self._band(0, height, channels, background)
        else:
            small = Image.new("RGB" if channels == 3 else "L", (across, height))
            for start in range(0, height, rows):
                band = self._band(start, min(start + rows, height), channels, background)
                part = (left, 0, right, band.height)
                small.paste(band.resize((across, band.height), Image.Resampling.LANCZOS, part), (0, start))
            left, right = 0, across
        small = small.resize((across, down), Image.Resampling.LANCZOS, (left, top, right, bottom))
        small.info.clear()
        turn = _TRANSPOSE.get(self.orientation)
        return small if turn is None else small.transpose(turn)

    def _stored(self, box: Box) -> Box:
        """A box of the upright image in the coordinates of the stored one."""
        width, height = self.upright_size
        left, top, right, bottom = box
        if self.orientation in {2, 3, 6, 7}:
            left, right = width - right, width - left
        if self.orientation in {3, 4, 7, 8}:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.orientation > 4 else (left, top, right, bottom)

    def _band(self, top: int, bottom: int, channels: int, background: Color) -> Image.Image:
        """Some rows, in "RGB" or "L"."""
        opaque, alpha = self._split_alpha(top, bottom)
        opaque = _to_srgb(opaque, self.image.info.get("icc_profile"))
        if alpha is not None:
            canvas = Image.new("RGB", opaque.size, background)
            canvas.paste(opaque, mask=alpha)
            opaque = canvas
        return _in_mode(opaque, "RGB" if channels == 3 else "L")

    def _split_alpha(self, top: int, bottom: int) -> tuple[Image.Image, Image.Image | None]:
        """Some rows in "L", "RGB", "CMYK" or "LAB", without their alpha, and their alpha as "L" (None = opaque)."""
        rows = _rows(self.image, top, bottom)
        if self.depth is not None:
            low = None if self.low is None else _rows(self.low, top, bottom)
            colour, alpha, peak = self.depth.to_eight_bits(rows, low, self.transparent)
            self.peak = max(self.peak, peak)
            return colour, alpha
        if self.transparent is not None and rows.mode in {"1", "L"}:
            gray = _in_mode(rows, "L")
            return gray, Image.fromarray(np.where(np.asarray(gray) == self.transparent, 0, 255).astype(np.uint8))
        if rows.has_transparency_data:
            layered = _in_mode(rows, "RGBA")
            return layered.convert("L" if rows.mode in {"LA", "La"} else "RGB"), layered.getchannel("A")
        if rows.mode in {"L", "RGB", "CMYK", "LAB"}:
            return rows, None
        return rows.convert("L" if rows.mode == "1" else "RGB"), None


def load(image: Image.Image, white_level: int = WHITE_LEVEL) -> Samples:
    """Decode an opened image; `white_level` is the 16-bit sample that means white.

    Raises RejectedImage for whatever Pillow refuses to decode and for samples whose meaning is not known. Nothing that
    Pillow raises is caught before all samples are there.
    """
    with rejecting():
        _check_scans(image)
        rawmode = _rawmode(image)
        depth = depth_of(image, rawmode, white_level)
        low = None if depth is None else low_bytes(image, rawmode)
        image.load()
        transparent = _transparent(image, rawmode)
        return Samples(image, depth, low, transparent, orientation(image))


def to_rgb_or_gray(image: Image.Image, channels: int, background: Color = WHITE) -> Image.Image:
    """The first frame, upright, as 8-bit "RGB" (`channels` 3) or "L" (1), with nothing but pixels left.

    EXIF orientation is applied; embedded profiles are converted to sRGB; transparency is laid over `background`; 16-bit
    samples are scaled by 1/257. Raises `RejectedImage`, also for truncated files.
    """
    with rejecting():
        return load(image).whole(channels, background)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation 1 to 8; anything missing, invalid or unreadable is 1.

    To find it, Pillow decodes formats that may keep it behind the pixels. So, except for JPEG, only ask an image that
    is loaded: what is caught here would hide that it could not be decoded.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata must not cost a sound picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def is_gray(image: Image.Image) -> bool:
    """Whether the file itself says that it has no colour (from the header alone)."""
    return image.mode in {"1", "L", "LA", "La", "F", "I"} or image.mode.startswith("I;16") or _is_gray_alpha(image)


def _is_gray_alpha(image: Image.Image) -> bool:
    """A PNG of 16-bit gray with alpha, which Pillow opens as "RGBA"."""
    return _rawmode(image).startswith("LA;16")


def _rawmode(image: Image.Image) -> str:
    """How samples are packed in the file, in Pillow's words; empty for images that are decoded already."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _check_scans(image: Image.Image) -> None:
    """A JPEG may ask to be decoded thousands of times over; real ones have about ten scans.

    The marker of a scan cannot occur inside compressed data, and by chance once in 64 KiB of whatever is appended.
    """
    file = getattr(image, "fp", None)
    if image.format not in {"JPEG", "MPO"} or file is None:
        return
    position = file.tell()
    file.seek(0)
    scans, size = 0, 0
    while piece := file.read(2**20):
        scans += piece.count(b"\xff\xda")
        size += len(piece)
    file.seek(position)
    if scans > _MAX_SCANS + size // 2**14:
        raise RejectedImage(f"too much work: a JPEG of {scans} scans, the most is {_MAX_SCANS}")


def _transparent(image: Image.Image, rawmode: str) -> tuple[int, ...] | None:
    """The transparent sample of a gray or RGB PNG, in the scale of the decoded samples.

    As the PNG standard says, only as many bits of it count as the samples have.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or value is None or isinstance(value, bytes):
        return None
    values = value if isinstance(value, tuple) else (value,)
    if ";16" in rawmode or image.mode.startswith("I"):
        return values
    step = _GRAY_STEP.get(rawmode, 1)
    values = tuple((each & (255 // step)) * step for each in values)
    image.info["transparency"] = values if len(values) > 1 else values[0]
    return values


def _rows(image: Image.Image, top: int, bottom: int) -> Image.Image:
    return image if bottom - top == image.height else image.crop((0, top, image.width, bottom))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image` ("L", "RGB", "CMYK" or "LAB") through its embedded profile; a useless profile is ignored."""
    transform = _profile_transform(profile, image.mode) if profile and image.mode != "LAB" else None
    if transform is not None:
        return transform.apply(image)
    return image if image.mode == "L" else _in_mode(image, "RGB")


@lru_cache(maxsize=64)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None where it already is sRGB, is damaged, or belongs to another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "RGB" and "srgb" in (source.profile.profile_description or "").lower():
            dark = transform.apply(Image.new("RGB", (1, 1), (_DARK, _DARK, _DARK))).tobytes()
            if max(abs(value - _DARK) for value in dark) <= _ALIKE:  # not so with a linear curve
                return None
        return transform
    except Exception:
        return None
