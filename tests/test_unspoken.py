"""Inputs whose meaning used to be guessed, or whose harm passed without a word."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffkit.datasets.columns import read_column
from diffkit.datasets.folder import folder
from diffkit.datasets.pixels import to_rgb_or_gray
from diffkit.datasets.tablefile import read_sheet
from diffkit.engine.inputs import open_masks, open_pictures
from diffkit.errors import DiffkitError
from diffkit.extractors.weights import load_weights
from diffkit.interfaces import Example
from diffkit.measure.images import _fingerprint, _samples


def gray(path: Path, value: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def linear_profile(description: str) -> bytes:
    """sRGB's primaries with the curve of linear light."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = description.encode("utf-16-be")
    named = b"mluc" + bytes(4) + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    (count,) = struct.unpack(">I", raw[128:132])
    tags = [struct.unpack(">4sII", raw[132 + 12 * at : 144 + 12 * at]) for at in range(count)]
    table, body, offset = b"", b"", 132 + 12 * count
    for name, start, length in tags:
        data = raw[start : start + length]
        data = b"curv" + bytes(8) if name.endswith(b"TRC") else named if name == b"desc" else data
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    made = raw[:128] + struct.pack(">I", count) + table + body
    return struct.pack(">I", len(made)) + made[4:84] + bytes(16) + made[100:]


def test_a_linear_profile_that_calls_itself_srgb_is_applied() -> None:
    profile = linear_profile("GIMP built-in Linear sRGB")
    image = Image.new("RGB", (2, 2), (55, 55, 55))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    wanted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    assert wanted is not None and wanted.getpixel((0, 0))[0] > 120  # type: ignore[index]
    image.info["icc_profile"] = profile
    assert np.array_equal(np.asarray(to_rgb_or_gray(image, 3)), np.asarray(wanted))


def test_a_folder_of_one_mask_is_for_the_image_of_its_name(tmp_path: Path) -> None:
    for name in ("000.png", "001.png"):
        gray(tmp_path / "src" / name)
    gray(tmp_path / "masks" / "000.png", 255)
    sources = open_pictures(tmp_path / "src", (8, 8), 1, None)
    with pytest.raises(DiffkitError, match=r"holds no mask for 001\.png"):
        open_masks(tmp_path / "masks", sources, (8, 8))
    assert len(open_masks(tmp_path / "masks" / "000.png", sources, (8, 8))) == 2


def test_what_a_users_folder_holds_besides_is_named(tmp_path: Path) -> None:
    gray(tmp_path / "src" / "a.png")
    (tmp_path / "src" / "b.heic").write_bytes(b"x")
    (tmp_path / "src" / "c.png").write_bytes(b"x")
    rejected, passed_over = open_pictures(tmp_path / "src", (8, 8), 1, None).notes
    assert rejected.startswith(f"1 file in {tmp_path / 'src'} cannot be used and is skipped: c.png (")
    assert passed_over == f"1 file in {tmp_path / 'src'} is skipped: b.heic (not a supported format: .heic)."


def test_features_are_kept_for_contents_not_for_times(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    found = []
    for value in (10, 200):
        gray(path, value)
        os.utime(path, (315532800, 315532800))
        found.append(_fingerprint([Example(path, None, "a.bmp")]))
    assert found[0] != found[1]


def test_a_sample_listed_twice_is_measured_once(tmp_path: Path) -> None:
    gray(tmp_path / "0.png")
    (tmp_path / "samples.jsonl").write_text('{"file": "0.png", "class": null}\n' * 2)
    assert len(_samples(tmp_path)[0]) == 1


@pytest.mark.parametrize("labels", [[5, 6], [None], [["000.png", 1, 2]]])
def test_an_entry_of_labels_that_is_not_a_pair_is_named(tmp_path: Path, labels: object) -> None:
    (tmp_path / "l.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(DiffkitError, match=r"entry 1 of its labels must be \[name, label\]"):
        read_sheet(tmp_path / "l.json")


def test_an_entry_and_its_file_name_must_agree(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps({"a.png": {"file_name": "a.png", "age": 1}}))
    assert read_sheet(tmp_path / "l.json").rows == [{"file_name": "a.png", "age": 1}]
    (tmp_path / "l.json").write_text(json.dumps({"a.png": {"file_name": "b.png", "age": 1}}))
    with pytest.raises(DiffkitError, match=r"the entry 'a.png' has another file_name, \"b.png\""):
        read_sheet(tmp_path / "l.json")


def test_weights_in_the_cache_are_verified_before_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFKIT_WEIGHTS", str(tmp_path))
    torch.save({"weight": torch.arange(300.0)}, tmp_path / "made")
    data = bytearray((tmp_path / "made").read_bytes())
    name = f"made-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(data)
    assert load_weights("", f"http://127.0.0.1:9/{name}", "inception")["weight"].sum() == 44850
    data[data.index(struct.pack("<f", 77.0))] ^= 1  # a weight: torch.load notices nothing
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DiffkitError, match="its sha256 begins with"):
        load_weights("", f"http://127.0.0.1:9/{name}", "inception")


@pytest.mark.parametrize("cell", ["1" * 100_000 + "x", "1" + " " * 100_000 + "x"])
def test_the_time_for_a_cell_grows_with_its_length_only(cell: str) -> None:
    """Backtracking through the digits would take minutes."""
    assert read_column("a", [cell, "1", "2", "3"]).kind == "numbers"


def test_keys_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", f"k{n}": n}) + "\n" for n in range(3000))
    )
    with pytest.raises(DiffkitError, match="more than 2,000 different keys"):
        read_sheet(tmp_path / "l.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_that_nobody_writes_to_holds_no_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "l.csv")
    with pytest.raises(DiffkitError, match="holds no rows"):
        read_sheet(tmp_path / "l.csv")


def test_members_of_archives_may_begin_with_the_folder_they_were_packed_in(tmp_path: Path) -> None:
    gray(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("./cat/0.png", "./dog/1.png"):
            archive.writestr(name, (tmp_path / "a.png").read_bytes())
    found = list(folder(str(tmp_path / "x.zip")))
    assert [(each.id, each.label) for each in found] == [("cat/0.png", "cat"), ("dog/1.png", "dog")]


def test_a_bitmap_without_an_extension_is_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a", "BMP")
    gray(tmp_path / "b.png")
    assert [each.id for each in folder(str(tmp_path))] == ["a", "b.png"]


def test_what_holds_hidden_images_only_is_not_just_empty(tmp_path: Path) -> None:
    gray(tmp_path / ".thumbs" / "a.png")
    with pytest.raises(DiffkitError, match=r"is empty but for hidden files and folders.*\.thumbs"):
        list(folder(str(tmp_path)))
