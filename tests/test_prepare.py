"""From examples to a prepared data set."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import call_diffkit, run_diffkit
from diffkit import durable
from diffkit.datasets.folder import folder
from diffkit.datasets.imagefile import Refused
from diffkit.engine.fitting import draft, fit
from diffkit.engine.prepare import Event, Finished, Prepared, PrepareOptions, prepare
from diffkit.engine.store import Store
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Account, Example, Listing

ORIENTATION = 274


def noise(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def options(size: int = 8, **changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"height": size, "width": size, "holdout": 0.0, "workers": 2, **changes})


def finish(examples: Any, out: Path, chosen: PrepareOptions | None = None) -> Finished:
    *_, last = prepare(examples, out, chosen or options())
    assert isinstance(last, Finished)
    return last


def stored(image: Any, out: Path, chosen: PrepareOptions) -> np.ndarray:
    finish([Example(image, id="it")], out, chosen)
    return np.load(out / "images-00000.npy")[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def photo_folder(root: Path, count: int = 24) -> Path:
    """Three classes of small PNG files in all shapes, with an exact duplicate, a stray file and a bad one."""
    for number in range(count):
        path = root / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = number % (count - 1)
        Image.fromarray(noise(seed, 8 + seed % 5, 10)).save(path)
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "bad.png").write_bytes((root / "b" / "001.png").read_bytes()[:90])
    return root


def same_bytes(one: Path, two: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return names == sorted(p.name for p in two.iterdir()) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names
    )


def test_pixels_of_the_right_size_are_stored_unchanged_and_in_order(tmp_path: Path) -> None:
    arrays = [noise(n) for n in range(10)]
    done = finish([Example(array) for array in arrays], tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "images-00000.npy"), arrays)
    assert (done.count, done.holdout_count, done.rejected, done.enlarged, done.duplicates) == (10, 0, 0, 0, 0)
    assert [line["id"] for line in lines(tmp_path / "out" / "examples.jsonl")] == [str(n) for n in range(10)]


def test_the_statistics_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    arrays = np.stack([noise(n) // (1 + n % 3) for n in range(60)])
    finish([Example(array) for array in arrays], tmp_path / "out", options(holdout=0.3))
    store = Store.open(tmp_path / "out")
    train, _ = store.gather(np.arange(store.count))
    values = train.astype(np.float64) / 127.5 - 1
    assert 0 < store.holdout_count < 60 and store.count + store.holdout_count == 60
    assert np.allclose(store.mean, values.mean((0, 1, 2)), atol=1e-12)
    assert np.allclose(store.std, values.std((0, 1, 2)), atol=1e-12)
    assert store.sigma_data == pytest.approx(np.sqrt(np.square(values).mean()), abs=1e-12)


def test_blank_images_have_a_sigma_that_divides_nothing_by_zero(tmp_path: Path) -> None:
    finish([Example(np.full((8, 8, 3), 255, np.uint8))], tmp_path / "out")
    store = Store.open(tmp_path / "out")
    assert store.mean == (1.0, 1.0, 1.0) and store.std == (0.0, 0.0, 0.0)
    assert store.sigma_data == pytest.approx(1.0)


def test_the_result_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    for workers in (1, 2, 7):
        chosen = options(holdout=0.2, crop="random", workers=workers, shard_images=4)
        finish(folder(str(photos)), tmp_path / f"out{workers}", chosen)
    assert same_bytes(tmp_path / "out1", tmp_path / "out2")
    assert same_bytes(tmp_path / "out1", tmp_path / "out7")


def test_a_folder_becomes_a_store_with_every_file_accounted_for(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    events = list(prepare(folder(str(photos)), tmp_path / "out", options(holdout=0.2, shard_images=5), source="photos"))
    done = events[-1]
    assert isinstance(done, Finished) and (done.rejected, done.duplicates) == (1, 1)
    assert [e.done for e in events[:-1] if isinstance(e, Prepared)] == list(range(1, 26))
    (rejected,) = lines(tmp_path / "out" / "rejected.jsonl")
    assert rejected["id"] == "b/bad.png" and rejected["reason"].startswith("damaged: ")
    assert done.reasons == {"damaged": 1}
    store, records = Store.open(tmp_path / "out"), lines(tmp_path / "out" / "examples.jsonl")
    assert store.verify() == [] and store.spec.classes == ("a", "b", "c") and store.index["source"] == "photos"
    assert store.count == done.count and store.count + store.holdout_count == 24 == len(records)
    for part in ("train", "holdout"):
        mine = [record for record in records if record["part"] == part]
        images, labels = store.gather(np.arange(len(mine)), part)
        assert labels is not None
        for record, pixels, label in zip(mine, images, labels, strict=True):
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["sha256"]
            assert store.spec.classes[label] == record["label"] == record["id"].split("/")[0]
            with Image.open(record["path"]) as image:
                assert image.size == (record["width"], record["height"])
    assert sum(store.class_counts.values()) == store.count


def test_shards_are_plain_npy_files_of_the_chosen_length(tmp_path: Path) -> None:
    arrays = [noise(n) for n in range(7)]
    finish([Example(array) for array in arrays], tmp_path / "out", options(shard_images=3))
    shards = [np.load(tmp_path / "out" / f"images-0000{n}.npy") for n in range(3)]
    assert [len(shard) for shard in shards] == [3, 3, 1]
    assert np.array_equal(np.concatenate(shards), arrays)


def test_exact_duplicates_are_counted_and_fall_on_the_same_side(tmp_path: Path) -> None:
    arrays = [noise(n) for n in range(40)]
    done = finish([Example(array) for array in arrays * 2], tmp_path / "out", options(holdout=0.5))
    assert done.duplicates == 40
    sides: dict[str, set[str]] = {}
    for record in lines(tmp_path / "out" / "examples.jsonl"):
        sides.setdefault(record["sha256"], set()).add(record["part"])
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())
    assert 10 < done.holdout_count / 2 < 30


def test_labels_without_a_training_image_are_dropped(tmp_path: Path) -> None:
    examples = [Example(noise(n), label=label) for n, label in enumerate(["z", "b", None, "b"])]
    examples.append(Example(Refused("broken"), label="gone"))
    done = finish(examples, tmp_path / "out", options(max_rejected=1.0))
    assert done.spec.classes == ("b", "z") and done.class_counts == {"b": 2, "z": 1} and done.unlabelled == 1
    assert np.load(tmp_path / "out" / "labels-00000.npy").tolist() == [1, 0, -1, 0]


def test_a_single_class_is_no_class(tmp_path: Path) -> None:
    done = finish([Example(noise(n), label="cats") for n in range(3)], tmp_path / "out")
    assert done.spec.classes == ()
    assert not (tmp_path / "out" / "labels-00000.npy").exists()


def on_side(held: bool, share: float, start: int = 0) -> np.ndarray:
    """An image whose content decides for (or against) the hold-out at this share."""
    sides = (array for array in map(noise, range(start, 9999)) if (fraction(array) < share) == held)
    return next(sides)


def fraction(array: np.ndarray) -> float:
    return int(hashlib.sha256(array.tobytes()).hexdigest()[:16], 16) / 2**64


def test_the_only_image_of_a_class_stays_in_training(tmp_path: Path) -> None:
    held = [on_side(True, 0.3, start) for start in (0, 500, 1000, 1500)]
    kept = [on_side(False, 0.3, start) for start in (0, 500, 1000)]
    examples = [
        Example(held[0], "rare", "rare"),
        Example(held[1], "late", "late/0"),
        Example(held[2], "late", "late/1"),
        Example(kept[0], "late", "late/2"),
        Example(kept[1], "many", "many/0"),
        Example(held[3], "many", "many/1"),
        Example(kept[2], "many", "many/2"),
    ]
    done = finish(examples, tmp_path / "out", options(holdout=0.3))
    store, records = Store.open(tmp_path / "out"), lines(tmp_path / "out" / "examples.jsonl")
    parts = {record["id"]: record["part"] for record in records}
    assert {name for name, part in parts.items() if part == "holdout"} == {"late/0", "late/1", "many/1"}
    assert done.class_counts == {"late": 1, "many": 2, "rare": 1}
    assert any("rare: the only image of its class" in remark for remark in done.account.remarks)
    assert store.index["kept_from_holdout"] == ["rare"]
    pixels = {example.id: example.image for example in examples}
    for part in ("train", "holdout"):
        mine = [record for record in records if record["part"] == part]
        images, labels = store.gather(np.arange(len(mine)), part)
        assert labels is not None
        assert all(np.array_equal(image, pixels[each["id"]]) for image, each in zip(images, mine, strict=True))
        assert [store.spec.classes[label] for label in labels] == [each["label"] for each in mine]
    train, _ = store.gather(np.arange(store.count))
    assert np.allclose(store.mean, (train / 127.5 - 1).mean((0, 1, 2)), atol=1e-12)


def test_a_split_of_the_source_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    arrays = [noise(n) for n in range(20)]
    examples = [
        Example(array, "ab"[n % 2] if n else "z", str(n), part="train" if n > 7 else "holdout")
        for n, array in enumerate(arrays)
    ]
    done = finish(examples, tmp_path / "kept", options(holdout=0.9))
    assert (done.count, done.holdout_count) == (12, 8)
    assert done.account.problems == {"class among held-out images only": ["z"]}
    parts = [record["part"] for record in lines(tmp_path / "kept" / "examples.jsonl")]
    assert parts == ["holdout"] * 8 + ["train"] * 12
    assert finish(examples, tmp_path / "mixed", options(keep_split=False)).count == 20


def test_labels_that_look_the_same_are_said(tmp_path: Path) -> None:
    labels = ["cat", "Cat", "red panda", "Red  Panda", "dog"]
    done = finish([Example(noise(n), label) for n, label in enumerate(labels)], tmp_path / "out")
    assert done.account.problems == {
        "label that differs from another in spelling only": ["Cat, cat", "Red  Panda, red panda"]
    }


def test_attributes_that_never_vary_are_left_out_and_said(tmp_path: Path) -> None:
    examples = [Example(noise(n), attributes={"age": n, "planet": 3}) for n in range(4)]
    done = finish(examples, tmp_path / "out")
    assert [each.name for each in done.spec.attributes] == ["age"]
    assert "Attributes that are the same in all training images, left out: planet." in done.account.remarks


def test_the_account_of_the_source_is_recorded(tmp_path: Path) -> None:
    account = Account(
        ["so"], {"row without an image": ["x"]}, [("a.heic", "not a supported format")], {"layout": ["so"]}
    )
    done = finish(Listing([Example(noise(1), id="0")], account), tmp_path / "out")
    assert done.account is account and done.rejected == 0
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (index["passed_over"], index["layout"], index["rejected"]) == (1, ["so"], 0)
    assert lines(tmp_path / "out" / "rejected.jsonl") == [
        {"id": "a.heic", "path": "a.heic", "reason": "not a supported format"}
    ]


@pytest.mark.parametrize(
    ("account", "extra", "words"),
    [
        (Account(skipped=[("a.heic", "not a supported format")]), [], "1 file passed over: a.heic"),
        (Account(problems={"row without an image": ["x", "y"]}), [], "2 rows without an image: x, y"),
        (Account(problems={"class among held-out images only": ["x", "y"]}), [], "2 classes among held-out"),
        (Account(), [Example(Refused("damaged: x"), id="bad")], r"1 image rejected: bad \(damaged: x\)"),
        (Account(), [Example(noise(9), id="loose")], "1 image without a label: loose"),
    ],
)
def test_strict_writes_nothing_unless_everything_fits(
    tmp_path: Path, account: Account, extra: list[Example], words: str
) -> None:
    good = [Example(noise(n), "ab"[n % 2], str(n)) for n in range(4)]
    with pytest.raises(DiffkitError, match=words) as caught:
        finish(Listing([*good, *extra], account), tmp_path / "out", options(strict=True, max_rejected=1.0))
    assert caught.value.code == ExitCode.DATA
    assert list(tmp_path.iterdir()) == []
    finish(Listing([*good, *extra], account), tmp_path / "lax", options(max_rejected=1.0))
    finish(good, tmp_path / "out", options(strict=True))
    finish(good, tmp_path / "same", options())
    assert same_bytes(tmp_path / "out", tmp_path / "same")


def test_the_command_line_says_and_records_what_it_understood(tmp_path: Path) -> None:
    for name in ("train/cat/0", "train/dog/0", "train/dog/1", "val/cat/0"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(len(name) + int(name[-1]) + 9 * (name[0] == "v"))).save(path)
    (tmp_path / "photos" / "x.heic").touch()
    table = tmp_path / "ages.txt"
    table.write_bytes(
        "Bild;Größe\ntrain/cat/0.png;1,5\ntrain/dog/0.png;2\ntrain/dog/1.png;?\nq.png;3\n".encode("cp1252")
    )
    arguments = ("prepare", "photos", "--size", 8, "--labels", "ages.txt", "-o")
    done = run_diffkit(*arguments, "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "3 images of 8x8, colour, 1 held out",
        "2 classes: cat 1, dog 2",
        "train/, val/ are taken as a split",
        "ages.txt (semicolons, cp1252 (not UTF-8)): 4 rows, names in the column 'Bild'; 3 of 4 images have a row",
        "Größe (numbers with decimal commas, 1 unknown: ?)",
        "1 row without an image: line 5 (q.png)",
        "1 image without a row: val/cat/0.png",
        "1 file passed over (not a supported format: .heic (1)): see rejected.jsonl",
    ):
        assert words in done.stderr
    record = json.loads((tmp_path / "data" / "dataset.json").read_text(encoding="utf-8"))["labels"]
    assert (record["rows"], record["images_with_row"], record["name_column"]) == (4, 3, "Bild")
    summary = json.loads(call_diffkit(*arguments, "again", "--json", cwd=tmp_path).stdout)
    assert summary["labels"] == record
    assert summary["problems"] == {"row without an image": ["line 5 (q.png)"], "image without a row": ["val/cat/0.png"]}
    mixed = call_diffkit(*arguments, "mixed", "--holdout", "0", "--json", cwd=tmp_path)
    assert json.loads(mixed.stdout)["images"] == 4
    strict = call_diffkit(*arguments, "strict", "--strict", cwd=tmp_path)
    assert strict.returncode == 3 and "1 row without an image: line 5 (q.png)" in strict.stderr
    assert "1 file passed over: x.heic" in strict.stderr and not (tmp_path / "strict").exists()
    named = call_diffkit(*arguments, "named", "--labels-column", "Bilder", cwd=tmp_path)
    assert named.returncode == 3 and "Did you mean 'Bild'?" in named.stderr


def test_center_crop_keeps_the_middle_and_the_aspect_ratio(tmp_path: Path) -> None:
    wide = noise(1, 8, 20)
    assert np.array_equal(stored(wide, tmp_path / "wide", options(8)), wide[:, 6:14])
    tall = noise(1, 20, 8)
    assert np.array_equal(stored(tall, tmp_path / "tall", options(8)), tall[6:14])


def test_random_crop_is_fixed_by_the_id(tmp_path: Path) -> None:
    steps = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 4, 0).repeat(3, 2)
    examples = [Example(steps, id=f"image {n}") for n in range(30)]
    finish(examples, tmp_path / "one", options(4, crop="random"))
    finish(examples[::-1], tmp_path / "two", options(4, crop="random"))
    one, two = (np.load(tmp_path / name / "images-00000.npy") for name in ("one", "two"))
    assert np.array_equal(one, two[::-1])
    left = one[:, 0, 0, 0] / 4
    assert left.min() < 15 and left.max() > 40  # spread over the 56 possible places


def test_pad_keeps_everything_and_fills_with_the_background(tmp_path: Path) -> None:
    chosen = options(8, crop="pad", background=(1, 2, 3))
    pixels = stored(np.full((4, 8, 3), 200, np.uint8), tmp_path / "rgb", chosen)
    assert (pixels[2:6] == 200).all()
    assert (pixels[:2] == [1, 2, 3]).all() and (pixels[6:] == [1, 2, 3]).all()
    gray = stored(np.full((8, 4), 200, np.uint8), tmp_path / "gray", options(8, crop="pad", channels=1))
    assert gray[0, :, 0].tolist() == [255, 255, 200, 200, 200, 200, 255, 255]


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (7, 13), (641, 479)])
def test_any_shape_gives_the_chosen_shape(crop: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    pixels, width, height = fit(image, 16, 24, 3, crop, (10, 200, 30), "key")
    assert pixels.shape == (16, 24, 3) and (width, height) == size
    assert (pixels == [10, 200, 30]).all()


def test_enlarged_images_are_counted(tmp_path: Path) -> None:
    sizes = [(8, 8), (7, 30), (30, 7), (9, 9), (2, 2)]
    examples = [Example(noise(n, *size)) for n, size in enumerate(sizes)]
    assert finish(examples, tmp_path / "center").enlarged == 3
    assert finish(examples, tmp_path / "pad", options(crop="pad")).enlarged == 1


def test_files_of_several_frames_give_their_first_and_are_counted(tmp_path: Path) -> None:
    first, second = (Image.fromarray(noise(seed)) for seed in (1, 2))
    lossless = {"a.png": {}, "b.webp": {"lossless": True}, "c.tif": {}}
    source = tmp_path / "images"
    source.mkdir()
    for name, more in {**lossless, "d.gif": {}, "e.mpo.jpg": {"format": "MPO"}}.items():
        first.save(source / name, save_all=True, append_images=[second], **more)
    first.save(source / "f.png")
    first.save(source / "g.gif")
    damaged = bytearray((source / "c.tif").read_bytes())
    damaged[-8:] = b"\xff" * 8  # of the second page
    (source / "h.tif").write_bytes(damaged)
    done = finish(folder(source), tmp_path / "out")
    assert (done.count, done.rejected) == (8, 0)
    assert "5 files of several frames or pages: the first one is used." in done.account.remarks
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["first_of_several"] == 5
    images = np.load(tmp_path / "out" / "images-00000.npy")
    for index in (0, 1, 2, 5, 7):
        assert np.array_equal(images[index], noise(1))
    finish([Example(source / "f.png")], tmp_path / "still")
    assert "first_of_several" not in (tmp_path / "still" / "dataset.json").read_text()


def gradient_jpeg(width: int, height: int, **more: Any) -> io.BytesIO:
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    file = io.BytesIO()
    Image.fromarray(np.stack([across, down, across * 0], -1).astype(np.uint8)).save(file, "JPEG", quality=95, **more)
    return file


@pytest.mark.parametrize("size", [(1000, 400), (403, 999)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_drafted_jpeg_is_cropped_like_a_full_decode(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = gradient_jpeg(*size, exif=exif)
    pixels, width, height = fit(Image.open(file), 24, 32, 3, "center", (0, 0, 0), "")
    upright = Image.open(file).convert("RGB")
    if orientation == 6:
        upright = upright.transpose(Image.Transpose.ROTATE_270)
    assert (width, height) == upright.size
    scale = max(32 / width, 24 / height)
    box = ((width - 32 / scale) / 2, (height - 24 / scale) / 2, (width + 32 / scale) / 2, (height + 24 / scale) / 2)
    expected = np.asarray(upright.resize((32, 24), Image.Resampling.LANCZOS, box)).astype(float)
    assert np.abs(pixels - expected).max() <= 5


@pytest.mark.parametrize(("size", "expected"), [((4000, 1000), (500, 125)), ((255, 255), (255, 255))])
def test_draft_keeps_at_least_twice_the_frame(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.open(gradient_jpeg(*size))
    draft(image, (64, 60), cover=True)
    assert image.size == expected
    assert min(image.size) >= 2 * 60


def test_gray_is_chosen_only_when_asked_and_only_for_gray_images(tmp_path: Path) -> None:
    gray, color = [Example(noise(n)[..., 0]) for n in range(70)], Example(noise(99))
    assert finish(gray, tmp_path / "default").spec.channels == 3
    assert finish(gray, tmp_path / "auto", options(channels=0)).spec.channels == 1
    assert finish([*gray[:5], color], tmp_path / "mixed", options(channels=0)).spec.channels == 3
    with pytest.raises(DiffkitError, match="first 64 images are gray, but 70 is not"):
        finish([*gray, color], tmp_path / "late", options(channels=0))
    assert not (tmp_path / "late").exists()


def test_images_that_a_source_opened_survive_the_look_at_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(noise(1)).save(path)
    with Image.open(path) as image:
        assert np.array_equal(stored(image, tmp_path / "out", options(channels=0)), noise(1))


@pytest.mark.parametrize("array", [noise(1).astype(np.float32), noise(1)[None], noise(1, channels=4), noise(1)[:0]])
def test_arrays_that_are_no_images_are_rejected(tmp_path: Path, array: np.ndarray) -> None:
    done = finish([Example(array), Example(noise(2))], tmp_path / "out", options(max_rejected=0.5))
    assert done.reasons == {"not an image": 1}


def test_images_below_the_minimum_side_are_rejected(tmp_path: Path) -> None:
    examples = [Example(noise(1, 8, 20)), Example(noise(2, 9, 20))]
    done = finish(examples, tmp_path / "out", options(min_side=9, max_rejected=0.5))
    assert (done.count, done.reasons) == (1, {"too small": 1})


def failure(examples: Any, out: Path, chosen: PrepareOptions | None = None) -> str:
    with pytest.raises(DiffkitError) as caught:
        finish(examples, out, chosen)
    assert caught.value.code == ExitCode.DATA
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


def test_too_many_rejected_is_an_error_with_reasons_names_and_a_way_on(tmp_path: Path) -> None:
    examples = [Example(noise(n)) for n in range(8)] + [Example(Refused("damaged: xyz"), id="b/7.jpg")] * 2
    message = failure(examples, tmp_path / "out")
    assert "2 of 10 images (20.0%)" in message and "damaged (2)" in message
    assert "b/7.jpg (damaged: xyz)" in message and "--max-rejected 21%" in message
    assert finish(examples, tmp_path / "out", options(max_rejected=0.2)).rejected == 2


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    message = failure([Example(Refused("empty file"))] * 3, tmp_path / "out", options(max_rejected=1.0))
    assert "None of 3" in message and "empty file (3)" in message
    assert "no image" in failure([], tmp_path / "out")


def test_everything_held_out_is_an_error(tmp_path: Path) -> None:
    held = next(a for a in map(noise, range(99)) if int(hashlib.sha256(a.tobytes()).hexdigest()[:2], 16) < 128)
    assert "none is left for training" in failure([Example(held)], tmp_path / "out", options(holdout=0.5))


def test_an_existing_data_set_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    finish([Example(noise(1))], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(DiffkitError, match="exists already"):
        finish([Example(noise(2))], out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_an_abandoned_or_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Example]:
        yield from (Example(noise(n)) for n in range(30))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(interrupted(), tmp_path / "out")
    events: Iterator[Event] = prepare([Example(noise(n)) for n in range(30)], tmp_path / "out", options())
    next(events)
    assert len(list(tmp_path.iterdir())) == 1
    events.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("primitive", ["write", "sync", "rename"])
def test_a_failure_of_any_durable_operation_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, primitive: str
) -> None:
    real = getattr(durable, primitive)
    examples = [Example(noise(n), label="ab"[n % 2]) for n in range(5)]
    for fatal in range(100):
        left = [fatal]

        def failing(*arguments: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, os.strerror(28))
            real(*arguments)

        monkeypatch.setattr(durable, primitive, failing)
        try:
            finish(examples, tmp_path / "out", options(holdout=0.4, shard_images=2))
        except DiffkitError as error:
            assert error.code == ExitCode.MACHINE
            visible = [p for p in tmp_path.iterdir() if p.name != "out"]
            assert visible == []
            # Only the very last fsync, that of the parent folder, comes after the data set has appeared whole.
            assert not (tmp_path / "out").exists() or Store.open(tmp_path / "out").verify() == []
            if (tmp_path / "out").exists():
                return
        else:
            assert Store.open(tmp_path / "out").verify() == []
            return
    pytest.fail("never completed")


def test_pairs_are_stored_beside_their_images(tmp_path: Path) -> None:
    arrays = [noise(n) for n in range(40)]
    gray = [array[..., 0] for array in arrays]
    examples = [Example(array, input=other) for array, other in zip(arrays, gray, strict=True)]
    done = finish(examples, tmp_path / "out", options(holdout=0.3, channels=0, shard_images=7))
    assert (done.spec.channels, done.spec.image_channels) == (3, 1)
    store = Store.open(tmp_path / "out")
    assert store.verify() == []
    for part, count in (("train", store.count), ("holdout", store.holdout_count)):
        images, inputs = (store.column(kind, np.arange(count), part) for kind in ("images", "inputs"))
        assert images is not None and inputs is not None and count > 0
        assert np.array_equal(images[..., :1], inputs)


def test_an_image_without_a_pair_or_with_one_of_another_shape_is_rejected(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    examples = [Example(noise(n), input=noise(n)) for n in range(60)]
    done = finish([*examples, Example(noise(1)), Example(noise(2), input=wide)], tmp_path / "out")
    assert done.count == 60
    assert done.reasons == {"it has no pair": 1, "its pair is of another shape": 1}


def test_attributes_become_columns_with_ranges(tmp_path: Path) -> None:
    rows = [{"age": 20.0 + n, "smiling": float(n % 2), "always": 1.0} for n in range(10)]
    rows[3] = {"smiling": 1.0}
    rows[4] = {"age": float("nan")}
    done = finish([Example(noise(n), attributes=row) for n, row in enumerate(rows)], tmp_path / "out")
    assert [tuple(each) for each in done.spec.attributes] == [("age", 20.0, 29.0), ("smiling", 0.0, 1.0)]
    store = Store.open(tmp_path / "out")
    assert store.spec == done.spec and store.spec.label_width == 4
    values = store.column("attributes", np.arange(10))
    assert values is not None
    assert values[0].tolist() == [20.0, 0.0]
    assert np.isnan(values[3, 0]) and values[3, 1] == 1.0
    assert np.isnan(values[4]).all()


def test_undecodable_names_can_be_recorded(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"caf\xe9.png", "🌼\n.png".encode(), b"plain.png"):
        Image.fromarray(noise(len(name))).save(os.fsdecode(os.fsencode(photos) + b"/" + name), "PNG")
    finish(folder(str(photos)), tmp_path / "out")
    found = [line["id"] for line in lines(tmp_path / "out" / "examples.jsonl")]
    assert found == [r"caf\udce9.png", "plain.png", r"🌼\n.png"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0},
        {"crop": "centre"},
        {"channels": 4},
        {"holdout": 1.0},
        {"max_rejected": 2.0},
        {"workers": -1},
        {"min_side": -1},
        {"background": (0, 0, 256)},
    ],
)
def test_wrong_options_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(DiffkitError) as caught:
        PrepareOptions(**wrong)
    assert caught.value.code == ExitCode.USAGE


def test_a_misspelt_crop_names_the_nearest() -> None:
    with pytest.raises(DiffkitError, match="Did you mean 'center'"):
        PrepareOptions(crop="centre")


def deep(folder: Path, peak: int, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, peak, (8, 8), dtype=np.uint16, endpoint=True)
        pixels[0, 0] = peak
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_12_bit_data_in_16_bit_files_are_noticed_and_can_be_scaled(tmp_path: Path) -> None:
    source = deep(tmp_path / "scans", 4095)
    done = finish(folder(str(source)), tmp_path / "dark", options(channels=0))
    first, *_ = done.warnings
    assert first.startswith("3 images with 16-bit samples: none is larger than 4,095 of 65,535, so at most 15 of 255")
    assert first.endswith("If these are 12-bit values, prepare again with --white-level 4095.")
    assert json.loads((tmp_path / "dark" / "dataset.json").read_text())["warnings"] == list(done.warnings)
    scaled = finish(folder(str(source)), tmp_path / "scaled", options(channels=0, white_level=4095))
    assert scaled.warnings == ()
    samples = np.stack([np.asarray(Image.open(source / f"{number}.png")) for number in range(3)]).astype(float)
    expected = np.floor(samples * 255 / 4095 + 0.5)
    assert np.array_equal(np.load(tmp_path / "scaled" / "images-00000.npy")[..., 0], expected)


def test_full_16_bit_data_are_not_warned_of(tmp_path: Path) -> None:
    assert finish(folder(str(deep(tmp_path / "scans", 65535))), tmp_path / "out").warnings == ()
    mixed = deep(tmp_path / "mixed", 4095)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(mixed / "bright.png")
    assert finish(folder(str(mixed)), tmp_path / "both").warnings == ()


@pytest.mark.parametrize(("level", "shade"), [(2, "black"), (253, "white"), (120, "of one colour")])
def test_a_set_of_blank_images_is_warned_of(tmp_path: Path, level: int, shade: str) -> None:
    arrays = [(np.full((8, 8, 3), level) + (noise(n) > 127)).astype(np.uint8) for n in range(4)]
    (warning,) = finish([Example(array) for array in arrays], tmp_path / "blank").warnings
    assert warning.startswith(f"The images are nearly {shade}: mean {level}.") and "standard deviation 0.5" in warning
    drawing = [np.where(noise(n) > 30, 255, 0).astype(np.uint8) for n in range(4)]
    assert finish([Example(array) for array in drawing], tmp_path / "drawing").warnings == ()
