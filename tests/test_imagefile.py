"""Single image files: conversions with values worked out by hand, and a zoo of bad files."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffkit.datasets.imagefile import RejectedImage, one_line, open_image, printable
from diffkit.datasets.pixels import to_rgb_or_gray
from imagefiles import chunk, png

EXIF_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "exif-orientation"
ORIENTATION = 274


def saved(image: Image.Image, format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file


def first_pixel(image: Image.Image, channels: int = 3, background: tuple[int, int, int] = (255, 255, 255)) -> list[int]:
    plain = to_rgb_or_gray(image, channels, background)
    assert plain.mode == ("RGB" if channels == 3 else "L")
    return np.asarray(plain).reshape(-1, channels)[0].tolist()


def reason(source: Path | io.BytesIO) -> str:
    with pytest.raises(RejectedImage) as caught, open_image(source) as image:
        to_rgb_or_gray(image, 3)
    return caught.value.reason


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Modes: 51 = 20 %, 102 = 40 %, 128/255 of a colour over white (255): 255 - (255 - c) * 128/255.
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("1", (2, 2), 0), [0, 0, 0]),
        (Image.new("L", (2, 2), 77), [77, 77, 77]),
        (Image.new("LA", (2, 2), (100, 128)), [177, 177, 177]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), [255, 127, 127]),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 0)), [255, 255, 255]),
        (Image.new("RGBX", (2, 2), (1, 2, 3, 0)), [1, 2, 3]),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), [255, 0, 0]),
        (Image.new("YCbCr", (2, 2), (90, 128, 128)), [90, 90, 90]),
        (Image.fromarray(np.full((2, 2), 32768, np.uint16)), [128, 128, 128]),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), [255, 255, 255]),
        (Image.fromarray(np.full((2, 2), 257 * 9, np.uint16)), [9, 9, 9]),
        (Image.fromarray(np.full((2, 2), 32768, np.int32)), [128, 128, 128]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes_become_the_colour_they_mean(image: Image.Image, expected: list[int]) -> None:
    assert first_pixel(image) == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_files_are_scaled_not_saturated(mode: str, format: str) -> None:
    image = Image.frombytes(mode, (1, 1), struct.pack("<H" if mode == "I;16" else ">H", 32768))
    assert first_pixel(open_image(saved(image, format))) == [128, 128, 128]
    assert first_pixel(open_image(saved(image, format)), 1) == [128]


def test_lab_goes_through_its_own_colour_space() -> None:
    # L* = 50.2, a = b = 0: Y = ((50.2 + 16) / 116)^3 = 0.186, which sRGB writes as 119.4.
    assert first_pixel(Image.new("LAB", (2, 2), (128, 128, 128))) == pytest.approx([119.4] * 3, abs=1.5)


def test_floating_point_samples_are_rejected_with_a_reason() -> None:
    assert reason(saved(Image.new("F", (2, 2), 0.5), "TIFF")).startswith("floating-point samples")


@pytest.mark.parametrize("value", [70000, -1])
def test_samples_beyond_16_bits_are_rejected(value: int) -> None:
    with pytest.raises(RejectedImage, match="samples beyond 16 bits"):
        to_rgb_or_gray(Image.new("I", (2, 2), value), 1)


def test_alpha_is_laid_over_the_chosen_background() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert first_pixel(image, 3, (10, 20, 30)) == [10, 20, 30]
    assert first_pixel(image, 1, (100, 100, 100)) == [100]


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    for file in (saved(image, "PNG", transparency=0), saved(image, "GIF", transparency=0)):
        assert np.asarray(to_rgb_or_gray(open_image(file), 3)).tolist() == [[[255] * 3, [0, 255, 0]]]
    half = saved(image, "PNG", transparency=bytes([128, 255]))
    assert first_pixel(open_image(half)) == [255, 127, 127]


def test_a_transparent_colour_of_png_shows_the_background() -> None:
    gray = png(2, 1, 8, 0, bytes([0, 7, 9]), chunk(b"tRNS", struct.pack(">H", 7)))
    assert np.asarray(to_rgb_or_gray(open_image(gray), 1)).tolist() == [[255, 9]]
    rgb = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert np.asarray(to_rgb_or_gray(open_image(rgb), 3)).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_a_16_bit_transparent_colour_of_png_shows_the_background() -> None:
    rows = b"\0" + struct.pack(">HH", 32768, 40000)
    gray = png(2, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 32768)))
    assert np.asarray(to_rgb_or_gray(open_image(gray), 1)).tolist() == [[255, 156]]  # 40000 / 257 = 155.6
    rows = b"\0" + struct.pack(">HHHHHH", 0x8000, 0x8000, 0x8000, 0, 0, 0)
    rgb = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">HHH", 0x8000, 0x8000, 0x8000)))
    assert np.asarray(to_rgb_or_gray(open_image(rgb), 3)).tolist() == [[[255] * 3, [0, 0, 0]]]


def test_an_embedded_rgb_profile_is_converted_to_srgb() -> None:
    # sRGB with the primaries of red and blue exchanged and another name: its red is our blue.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp0").replace(b"bXYZ", b"rXYZ").replace(b"tmp0", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    file = saved(Image.new("RGB", (2, 2), (255, 0, 0)), "PNG", icc_profile=swapped)
    assert first_pixel(open_image(file)) == pytest.approx([0, 0, 255], abs=2)
    seen = saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG", icc_profile=swapped)
    assert first_pixel(open_image(seen)) == pytest.approx([127, 127, 255], abs=2)


def test_an_srgb_or_damaged_profile_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all", srgb[:200]):
        file = saved(Image.new("RGB", (2, 2), (200, 100, 50)), "PNG", icc_profile=profile)
        assert first_pixel(open_image(file)) == [200, 100, 50]


def cmyk_profile(lab: tuple[int, int, int]) -> bytes:
    """The smallest printer profile, a lut8 table: paper is white, K is black, any mixture of CMY looks like `lab`."""
    mixtures = [(255, 128, 128) if ink == 0 else (0, 128, 128) if ink % 2 else lab for ink in range(16)]
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(sum(mixtures, ())) + ramp * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags, offset, body = b"", 132 + 12 * 2, b""
    for name, data in ((b"A2B0", table), (b"wtpt", white)):
        data += b"\0" * (-len(data) % 4)
        tags += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 2) + tags + body


def test_cmyk_goes_through_its_embedded_profile() -> None:
    red = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert first_pixel(open_image(saved(red, "TIFF"))) == [255, 0, 0]
    profiled = saved(red, "TIFF", icc_profile=cmyk_profile((128, 128, 128)))
    assert first_pixel(open_image(profiled)) == pytest.approx([119.4] * 3, abs=2)


# EXIF 2.3, tag Orientation: which visual side row 0 and column 0 of the stored pixels are.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


def with_orientation(pixels: np.ndarray, value: int, format: str) -> io.BytesIO:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    options = {"lossless": True} if format == "WEBP" else {}
    return saved(Image.fromarray(np.ascontiguousarray(pixels)), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", list(STORED))
def test_exif_orientation_is_applied_once(format: str, value: int) -> None:
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    image = open_image(with_orientation(STORED[value](upright), value, format))
    assert np.array_equal(np.asarray(to_rgb_or_gray(image, 3)), upright)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_invalid_orientation_is_ignored(value: int) -> None:
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    image = open_image(with_orientation(upright, value, "PNG"))
    assert np.array_equal(np.asarray(to_rgb_or_gray(image, 3)), upright)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    image = open_image(saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\xff\xff\xff"))
    assert to_rgb_or_gray(image, 3).size == (64, 48)


@pytest.mark.skipif(not EXIF_PHOTOS.exists(), reason="the photos with EXIF orientations are not here")
@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_real_photos_of_all_orientations_look_alike(kind: str) -> None:
    views = []
    for value in range(9):
        with open_image(EXIF_PHOTOS / f"{kind}_{value}.jpg") as image:
            small = to_rgb_or_gray(image, 3).resize((48, 48), Image.Resampling.BOX)
            views.append(np.asarray(small).astype(float))
    # A number in the middle tells them apart; everything else is the same scene.
    assert max(np.abs(view - views[1]).mean() for view in views) < 3


def test_metadata_does_not_come_through() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    file = saved(photo(), "JPEG", exif=exif, comment=b"secret", dpi=(72, 72))
    plain = to_rgb_or_gray(open_image(file), 3)
    assert plain.info == {}
    assert dict(plain.getexif()) == {}


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        file = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert first_pixel(open_image(file)) == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_files_are_rejected_not_half_decoded(tmp_path: Path, format: str, kept: float) -> None:
    whole = saved(photo(), format).getvalue()
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert reason(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"),
        (b"hello, I am a text\n", "not a supported format: text"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a supported format: an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "not a supported format: a HEIC photo"),
        (b"\xff\xd8\xff", "not a supported format, or damaged at its start"),
        (b"\x00\x01\x02", "not a supported format, or damaged at its start"),
    ],
)
def test_other_things_called_jpg_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    assert reason(path) == expected
    assert reason(io.BytesIO(content)) == expected


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG").getvalue())
    with open_image(path) as image:
        assert first_pixel(image) == [1, 2, 3]


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO"])
def test_formats_outside_the_list_are_rejected(format: str) -> None:
    assert reason(saved(photo(), format)).startswith("not a supported format")


def test_a_bomb_is_rejected_by_its_header() -> None:
    for width, height in ((12_000, 9_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)):
        assert reason(png(width, height, 8, 2, b"")).startswith("too many pixels")


def test_large_photos_pass_the_header_check_without_a_warning() -> None:
    with open_image(png(10_000, 9_900, 8, 2, b"")) as image:
        assert image.size == (10_000, 9_900)


def test_a_compressed_text_bomb_is_rejected() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 20_000_000))
    assert reason(png(2, 2, 8, 2, b"\0" * 14, bomb)).startswith("damaged")


def test_no_zero_size_image_gets_through() -> None:
    assert reason(png(0, 5, 8, 2, b""))


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.jpg"
    os.mkfifo(fifo)
    assert reason(fifo) == "not a regular file"
    assert reason(tmp_path) == "not a regular file"
    assert reason(Path(os.devnull)) == "not a regular file"
    with socket.socket(socket.AF_UNIX) as server:
        place = tmp_path / "s.jpg"
        server.bind(str(place))
        assert reason(place) == "not a regular file"


def test_files_that_cannot_be_reached_have_a_reason(tmp_path: Path) -> None:
    assert reason(tmp_path / "gone.jpg").startswith("cannot be read")
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    assert reason(loop).startswith("cannot be read")


def test_no_damage_raises_anything_but_rejection() -> None:
    dice = random.Random(7)
    wholes = [saved(photo((16, 12)), format).getvalue() for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")]
    for _ in range(600):
        data = bytearray(dice.choice(wholes))
        for _ in range(dice.choice((1, 3, 20))):
            data[dice.randrange(min(len(data), dice.choice((40, 400, 4000))))] = dice.randrange(256)
        try:
            with open_image(io.BytesIO(bytes(data)), max_pixels=10**6) as image:
                plain = to_rgb_or_gray(image, 3)
        except RejectedImage as error:
            assert error.reason.isprintable()
        else:
            assert plain.mode == "RGB"


def test_limits_and_warning_filters_are_left_as_they_were() -> None:
    before, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    reason(io.BytesIO(b"nothing"))
    first_pixel(Image.new("L", (1, 1)))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (before, filters)


def test_names_become_printable_and_stay_different() -> None:
    names = ["a\nb", r"a\nb", "a\x1b[31m", os.fsdecode(b"a\xff"), r"a\udcff", "🌼 müll", "a\u202eb", "-rf"]
    shown = [printable(name) for name in names]
    assert len(set(shown)) == len(names)
    assert all(text.isprintable() and text.encode() for text in shown)
    assert printable("🌼 müll/1.jpg") == "🌼 müll/1.jpg"


def test_reasons_are_one_printable_line() -> None:
    assert one_line(ValueError("two\nlines \x1b[31m")) == "two lines ?[31m"
    assert one_line(ValueError()) == "ValueError"
