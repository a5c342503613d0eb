"""What samples mean: depths, colour spaces and transparency of files built by hand, with values worked out by hand."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from diffkit.datasets import pixels
from diffkit.datasets.imagefile import RejectedImage, open_image
from diffkit.datasets.pixels import load, to_rgb_or_gray
from imagefiles import chunk, png, tiff

GRAY, RGB = 1, 3
# v / 257, rounded: 128 is 0.498 and 129 is 0.502 levels.
DEEP = {0x0080: 0, 0x0081: 1, 0x8000: 128, 0xFFFF: 255, 257 * 9: 9, 40000: 156}


def values(file: io.BytesIO, channels: int = RGB) -> list[list[int]]:
    """The pixels of the first row."""
    with open_image(file) as image:
        return np.asarray(to_rgb_or_gray(image, channels)).reshape(-1, image.width, channels)[0].tolist()


def grays(file: io.BytesIO) -> list[int]:
    return [value for (value,) in values(file, GRAY)]


def reason(file: io.BytesIO) -> str:
    with pytest.raises(RejectedImage) as caught, open_image(file) as image:
        to_rgb_or_gray(image, RGB)
    return caught.value.reason


def words(order: str, *samples: int) -> bytes:
    return struct.pack(f"{order}{len(samples)}H", *samples)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_16_bit_gray_tiffs(order: str, deflated: bool) -> None:
    strip = words(order, *DEEP)
    assert grays(tiff(6, [strip], 1, [16], order=order, deflated=deflated)) == list(DEEP.values())


@pytest.mark.parametrize("deflated", [False, True])
def test_16_bit_tiffs_of_which_white_is_zero(deflated: bool) -> None:
    file = tiff(6, [words("<", *DEEP)], 0, [16], deflated=deflated)
    assert grays(file) == [255 - value for value in DEEP.values()]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_16_bit_colour_tiffs_keep_their_low_bytes(order: str, deflated: bool) -> None:
    strip = words(order, *DEEP)
    file = tiff(2, [strip], 2, [16] * 3, order=order, deflated=deflated)
    assert values(file) == [[0, 1, 128], [255, 9, 156]]


def test_16_bit_alpha_of_tiffs() -> None:
    colours = words("<", 0x4000, 0x2000, 0x1000, 0x8000)
    # 0x4000 is 64, alpha 0x8000 is 128: 64 * 128/255 + 255 * 127/255 = 159.
    assert values(tiff(1, [colours], 2, [16] * 4, extra=[2])) == [[159, 143, 135]]
    # Associated alpha: the stored colour has been multiplied by it, 64 is of 128.
    assert values(tiff(1, [colours], 2, [16] * 4, extra=[1])) == [[191, 159, 143]]
    # Unspecified: not alpha.
    assert values(tiff(1, [colours], 2, [16] * 4, extra=[0])) == [[64, 32, 16]]


def test_16_bit_cmyk() -> None:
    assert values(tiff(2, [words("<", 0, 65535, 65535, 0, 0, 0, 0, 0x8000)], 5, [16] * 4)) == [[255, 0, 0], [127] * 3]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (tiff(1, [struct.pack("<I", 70000)], 1, [32]), "samples of 32 bits"),
        (tiff(1, [struct.pack("<I", 7)], 1, [32]), "samples of 32 bits"),
        (tiff(1, [struct.pack("<i", 7)], 1, [32], sample_format=2), "signed samples"),
        (tiff(1, [struct.pack("<h", 7)], 1, [16], sample_format=2), "signed samples"),
        (tiff(1, [b"\x07"], 1, [8], sample_format=2), "signed samples"),
        (tiff(1, [struct.pack("<f", 0.5)], 1, [32], sample_format=3), "floating-point samples"),
        (tiff(1, [words("<", 1), words("<", 2), words("<", 3)], 2, [16] * 3, planar=2), "16-bit samples in separate"),
        (tiff(1, [words("<", 1, 2)], 1, [16, 16], extra=[2]), "not a supported kind of TIFF"),
    ],
    ids=["uint32", "small uint32", "int32", "int16", "int8", "float", "planar", "gray with alpha"],
)
def test_samples_whose_meaning_is_not_known_are_rejected(file: io.BytesIO, expected: str) -> None:
    assert reason(file).startswith(expected)


def test_8_bit_tiffs() -> None:
    assert values(tiff(2, [b"\1\2", b"\3\4", b"\5\6"], 2, [8] * 3, planar=2)) == [[1, 3, 5], [2, 4, 6]]
    assert grays(tiff(2, [b"\1\2"], 0, [8])) == [254, 253]
    assert grays(tiff(2, [b"\x10\xff\x10\x00"], 1, [8, 8], extra=[2])) == [16, 255]


def test_few_bits() -> None:
    assert grays(tiff(2, [b"\x1f"], 1, [4])) == [17, 255]
    assert grays(tiff(2, [b"\x1f"], 0, [4])) == [238, 0]
    assert grays(tiff(4, [b"\x1b"], 1, [2])) == [0, 85, 170, 255]
    assert grays(tiff(8, [b"\xf0"], 0, [1])) == [0] * 4 + [255] * 4
    assert grays(tiff(2, [b"\x80\x0f\xff"], 1, [12])) == [128, 255]  # 0x800 and 0xfff of 0xfff


def adam7(image: np.ndarray) -> bytes:
    """The rows of an interlaced PNG, seven times coarser to finer."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [image[top::down, left::across] for top, left, down, across in passes]
    return b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)


@pytest.mark.parametrize("color", [2, 6])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_colour_pngs_are_rounded_once(color: int, interlaced: bool) -> None:
    image = np.random.default_rng(color).integers(0, 65536, (5, 7, 3 + (color == 6)), dtype=np.uint16)
    image[..., 3:] = 65535
    rows = adam7(image) if interlaced else b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    with open_image(png(7, 5, 16, color, rows, interlaced=interlaced)) as opened:
        found = np.asarray(to_rgb_or_gray(opened, RGB))
    assert np.array_equal(found, np.rint(image[..., :3] / 257))


def test_16_bit_gray_with_alpha_of_png() -> None:
    assert grays(png(2, 1, 16, 4, b"\0" + words(">", 0x0081, 65535, 0x8000, 0x8000))) == [1, 191]


def test_a_16_bit_transparent_colour_matches_in_16_bits() -> None:
    gray = png(2, 1, 16, 0, b"\0" + words(">", 0x8001, 0x8002), chunk(b"tRNS", words(">", 0x8001)))
    assert grays(gray) == [255, 128]
    pair = words(">", 0x8001, 0x8001, 0x8001, 0x8002, 0x8001, 0x8001)
    assert values(png(2, 1, 16, 2, b"\0" + pair, chunk(b"tRNS", words(">", *[0x8001] * 3)))) == [[255] * 3, [128] * 3]


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\xf0", 0, [255] * 8),
        (1, b"\xf0", 1, [255] * 4 + [0] * 4),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x1f", 1, [255, 255]),
        (4, b"\x2f", 1, [34, 255]),
        (8, b"\x07\x09", 0x0107, [255, 9]),  # only as many bits count as samples have
    ],
)
def test_transparent_grays_of_few_bits(depth: int, row: bytes, transparent: int, expected: list[int]) -> None:
    file = png(len(expected), 1, depth, 0, b"\0" + row, chunk(b"tRNS", words(">", transparent)))
    assert grays(file) == expected


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged, under another name."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp0").replace(b"bXYZ", b"rXYZ").replace(b"tmp0", b"bXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def gray_profile(gamma: float) -> bytes:
    """The smallest gray profile: a white point and a tone curve that is a power."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I4sII4sII", 2, b"kTRC", 156, len(curve), b"wtpt", 156 + len(curve), len(white))
    body = table + curve + white
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + body


def with_profile(image: Image.Image, profile: bytes) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=profile)
    return file


def test_a_palette_goes_through_its_profile() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert values(with_profile(image, swapped_profile()))[0] == pytest.approx([0, 0, 255], abs=2)


def test_gray_goes_through_its_profile() -> None:
    # Linear light: sRGB writes a quarter of it as 255 * (1.055 * 0.251 ** (1 / 2.4) - 0.055) = 137.3.
    for mode, value in (("L", 64), ("I;16", 64 * 257), ("LA", (64, 255))):
        image = Image.new(mode, (1, 1), value)
        file = with_profile(image, gray_profile(1.0))
        assert grays(file) == pytest.approx([137.3], abs=1.5), mode
        file.seek(0)
        assert values(file)[0] == pytest.approx([137.3] * 3, abs=1.5), mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "RGB"])
def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch, orientation: int, mode: str) -> None:
    draw = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 65536, (37, 23), dtype=np.uint16))
    else:
        image = Image.fromarray(draw.integers(0, 256, (37, 23, 4), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = []
    for band in (2**20, 50):
        monkeypatch.setattr(pixels, "BAND", band)
        with open_image(file) as opened:
            samples = load(opened)
            width, height = samples.upright_size
            box = (1.5, 2.25, width - 3.0, height - 0.75)
            found.append(np.asarray(samples.resized((9, 11), box, RGB)))
            peak = samples.peak
    assert np.array_equal(*found)
    assert peak == (int(np.asarray(image).max()) if mode == "I;16" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_turned_image_is_that_part_of_the_upright_one(orientation: int) -> None:
    """Pillow's own exif_transpose, then resize, is the oracle; passes in the other order round by a level or two."""
    image = Image.fromarray(np.random.default_rng(1).integers(64, 192, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    box = (2.5, 7.0, upright.width - 10.25, upright.height - 1.0)
    expected = np.asarray(upright.resize((12, 17), Image.Resampling.LANCZOS, box)).astype(int)
    with open_image(file) as opened:
        found = np.asarray(load(opened).resized((12, 17), box, RGB))
    assert np.abs(found - expected).max() <= 2


def test_a_jpeg_of_thousands_of_scans_is_rejected_by_their_number() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64), 90).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole.rfind(b"\xff\xc4", 0, whole.rfind(b"\xff\xda"))
    many = io.BytesIO(whole[:-2] + whole[last:-2] * 5000 + b"\xff\xd9")
    assert reason(many).startswith("too much work: a JPEG of 50")
    assert values(io.BytesIO(whole + b"\xff\xda" * 100), GRAY)[0] == [90]
