"""Images that users bring to sample, invert and evaluate: found, turned and refused as in prepare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffkit.engine import reading
from diffkit.engine.inputs import open_masks, open_pictures
from diffkit.errors import DiffkitError
from diffkit.measure.images import open_images
from imagefiles import tiff

SIZE = (8, 8)
WHITE, BLACK = 255, 0


def noise(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)
    return path


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


def mask(path: Path, *, orientation: int = 1, height: int = 8, width: int = 8) -> Path:
    """Opaque black and white: the upper half is white."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2] = WHITE
    return save(Image.fromarray(pixels), path, orientation)


def test_a_folder_is_walked_as_prepare_walks_it(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save(noise(0), folder / "b.png")
    save(noise(1), folder / "a" / "c.png")
    save(noise(2), folder / "album.jpg" / "d.png")
    save(noise(3), folder / ".thumbs" / "e.png")
    save(noise(4), folder / ".hidden.png")
    save(noise(5), tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "notes.txt").write_text("x")
    pictures = open_pictures(folder, SIZE, 3)
    assert list(pictures.names) == ["a/c.png", "album.jpg/d.png", "b.png"]
    for index, seed in enumerate((1, 2, 0)):
        assert np.array_equal(pictures.read(index), np.asarray(noise(seed)))
    (note,) = pictures.notes
    assert note.startswith(f"1 file in {folder} cannot be used and is skipped: link.png (a link that leads outside")


def test_a_damaged_file_among_others_is_skipped_and_named_and_alone_it_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number in range(3):
        save(noise(number), folder / f"{number}.png")
    damage(folder / "1.png")
    pictures = open_pictures(folder, SIZE, 3)
    assert list(pictures.names) == ["0.png", "2.png"]
    assert np.array_equal(pictures.read(1), np.asarray(noise(2)))
    assert "1.png (damaged: " in pictures.notes[0]
    with pytest.raises(DiffkitError, match=r"1\.png cannot be used: damaged"):
        open_pictures(folder / "1.png", SIZE, 3)
    with pytest.raises(DiffkitError, match="There is no"):
        open_pictures(folder / "9.png", SIZE, 3)


def test_pixels_that_do_not_fit_into_memory_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        save(noise(number), tmp_path / "photos" / f"{number}.png")
    monkeypatch.setattr(reading, "KEPT", 2 * 8 * 8 * 3)
    pictures = open_pictures(tmp_path / "photos", SIZE, 3)
    for number in range(4):
        assert np.array_equal(pictures.read(number), np.asarray(noise(number)))
    damage(tmp_path / "photos" / "0.png")
    damage(tmp_path / "photos" / "3.png")
    assert np.array_equal(pictures.read(0), np.asarray(noise(0)))
    with pytest.raises(DiffkitError, match=r"3\.png in .* could be read before, and cannot be any more: damaged"):
        pictures.read(3)


def test_a_mask_painted_on_a_transparent_layer_is_white_where_it_was_painted(tmp_path: Path) -> None:
    source = open_pictures(save(noise(0), tmp_path / "photo.png"), SIZE, 3)
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:, 4:] = 255
    layer[:4, :4, :3] = 255  # white under full transparency: not painted
    path = tmp_path / "mask.png"
    Image.fromarray(layer).save(path)
    expected = np.zeros((8, 8, 1), np.uint8)
    expected[:, 4:] = WHITE
    assert np.array_equal(open_masks(path, source, SIZE).read(0), expected)
    layer[:, 4:, :3] = 0
    Image.fromarray(layer).save(path)
    with pytest.raises(DiffkitError, match=r"mask\.png is all black"):
        open_masks(path, source, SIZE)


def test_sizes_are_compared_and_masks_applied_upright(tmp_path: Path) -> None:
    # Stored sideways, 12 wide and 8 high; orientation 6: upright it is 8 wide and 12 high.
    source = open_pictures(save(noise(0, 8, 12), tmp_path / "phone.jpg", 6), (12, 8), 3)
    assert source.sizes == ((8, 12),)
    upright = open_masks(mask(tmp_path / "upright.png", height=12, width=8), source, (12, 8)).read(0)
    assert (upright[:6] == WHITE).all() and (upright[6:] == BLACK).all()
    # The same, stored turned by 90 degrees: white on the left, which orientation 6 turns to the top.
    pixels = np.zeros((8, 12), np.uint8)
    pixels[:, :6] = WHITE
    turned = save(Image.fromarray(pixels), tmp_path / "turned.png", 6)
    assert np.array_equal(open_masks(turned, source, (12, 8)).read(0), upright)
    with pytest.raises(DiffkitError, match=r"stored\.png is 12x8 .* phone\.jpg 8x12"):
        open_masks(mask(tmp_path / "stored.png", height=8, width=12), source, (12, 8))


def test_each_image_finds_the_mask_of_its_own_name(tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    for name in ("a/1", "b/1"):
        save(noise(1), photos / f"{name}.jpg")
    mask(masks / "a" / "1.png")
    save(Image.new("L", (8, 8), WHITE), masks / "b" / "1.png")
    source = open_pictures(photos, SIZE, 3)
    found = open_masks(masks, source, SIZE)
    assert list(found.names) == ["a/1.png", "b/1.png"]
    assert found.read(0).mean() == 127.5 and found.read(1).mean() == 255
    mask(masks / "b" / "1.tif")
    with pytest.raises(DiffkitError, match="masks for the same image"):
        open_masks(masks, source, SIZE)
    (masks / "b" / "1.tif").unlink()
    damage(masks / "b" / "1.png")
    with pytest.raises(DiffkitError, match=r"The mask b/1\.png cannot be used: "):
        open_masks(masks, source, SIZE)
    (masks / "b" / "1.png").rename(masks / "b" / "2.png")
    mask(masks / "b" / "2.png")
    with pytest.raises(DiffkitError, match=r"no mask for b/1\.jpg"):
        open_masks(masks, source, SIZE)


def loose(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        save(noise(number), folder / f"{number}.png")
    return folder


def test_a_folder_to_be_measured_skips_what_cannot_be_read_and_says_so(tmp_path: Path) -> None:
    folder = loose(tmp_path / "made")
    damage(folder / "1.png")
    save(noise(7), folder / ".thumbs" / "0.png")
    images, held_out = open_images(folder)
    assert held_out is None and images.count == 2 and images.name(1) == "2.png"
    assert np.array_equal(images.read(np.array([1, 0])), np.stack([np.asarray(noise(2)), np.asarray(noise(0))]))
    assert "1.png (damaged: " in images.notes[0]


def test_turned_photos_are_measured_upright(tmp_path: Path) -> None:
    save(noise(0, 8, 12), tmp_path / "made" / "0.png", 6)
    save(noise(1, 12, 8), tmp_path / "made" / "1.png")
    images, _ = open_images(tmp_path / "made")
    assert images.shape == (12, 8, 3)
    assert np.array_equal(images.read(np.array([0]))[0], np.rot90(np.asarray(noise(0, 8, 12)), -1))


def test_gray_files_are_a_gray_set_unless_one_has_colour(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 65536, 8, dtype=np.uint16)
    for number in range(2):
        (tmp_path / f"{number}.tif").write_bytes(tiff(8, [gray.astype("<u2").tobytes()], number, [16]).getvalue())
    images, _ = open_images(tmp_path)
    eight = np.rint(gray / 257)
    assert images.shape == (1, 8, 1)
    assert np.array_equal(images.read(np.arange(2))[:, 0, :, 0], [255 - eight, eight])
    save(noise(0, 1, 8), tmp_path / "2.png")
    assert open_images(tmp_path)[0].shape == (1, 8, 3)


def index(folder: Path, *records: object) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_samples_that_were_deleted_are_counted_and_named(tmp_path: Path) -> None:
    folder = loose(tmp_path / "made", 4)
    index(folder, *({"file": f"{number}.png", "class": None} for number in range(3)))
    (folder / "1.png").unlink()
    images, _ = open_images(folder)
    assert [images.name(number) for number in range(images.count)] == ["0.png", "2.png"]
    assert images.notes == (f"1 of 3 images that samples.jsonl lists are not in {folder} any more.",)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "completion": "b"},
        {"file": 7, "class": None},
        {"file": "0.png", "class": 3},
        {"file": "0.png"},
        {"file": "../0.png", "class": None},
        {"file": "/0.png", "class": None},
    ],
)
def test_a_samples_file_of_another_program_is_left_aside(tmp_path: Path, record: object) -> None:
    folder = loose(tmp_path / "made")
    index(folder, {"file": "1.png", "class": None}, record)
    images, _ = open_images(folder)
    assert images.count == 3
    assert "is not of diffkit sample: all images" in images.notes[0]
