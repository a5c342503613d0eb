"""Reading a prepared data set. The stores here are written with numpy alone, by the description of the format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffkit.engine.store import Store
from diffkit.errors import DiffkitError, ExitCode

TRAIN = np.random.default_rng(5).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, -1, 1, 0, 0, 1], np.int64)
HELD = TRAIN[:2] // 2


def write_store(folder: Path, *, sizes: tuple[int, ...] = (3, 3, 1), classes: tuple[str, ...] = ("a", "b")) -> Path:
    folder.mkdir()
    shards: list[dict[str, Any]] = []

    def put(name: str, kind: str, part: str, array: np.ndarray) -> None:
        np.save(folder / name, array)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        shards.append({"file": name, "kind": kind, "part": part, "images": len(array), "sha256": digest})

    start = 0
    for number, size in enumerate(sizes):
        put(f"images-{number:05d}.npy", "images", "train", TRAIN[start : start + size])
        if classes:
            put(f"labels-{number:05d}.npy", "labels", "train", LABELS[start : start + size])
        start += size
    put("holdout-images-00000.npy", "images", "holdout", HELD)
    if classes:
        put("holdout-labels-00000.npy", "labels", "holdout", LABELS[:2])
    spec = {"channels": 3, "height": 4, "width": 5, "classes": list(classes)}
    spec |= {"image_channels": 0, "dtype": "uint8"}
    index = {
        "format": "diffkit-dataset",
        "version": 1,  # without a checksum of itself
        "spec": {
            "channels": 3,
            "height": 4,
            "width": 5,
            "classes": list(classes),
            "image_channels": 0,
            "dtype": "uint8",
        },
        "count": len(TRAIN),
        "holdout_count": len(HELD),
        "class_counts": dict.fromkeys(classes, 3),
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "sigma_data": 0.5,
        "shards": shards,
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "data")


def rewrite(path: Path, **changes: Any) -> None:
    index = json.loads((path / "dataset.json").read_text())
    index.update(changes)
    (path / "dataset.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def failure(path: Path) -> str:
    with pytest.raises(DiffkitError) as caught:
        Store.open(path)
    assert caught.value.code == ExitCode.DATA
    return str(caught.value)


def test_what_was_recorded_is_read_back(store_path: Path) -> None:
    store = Store.open(store_path)
    assert (store.spec.height, store.spec.width, store.spec.channels, store.spec.classes) == (4, 5, 3, ("a", "b"))
    assert (store.count, store.holdout_count, store.sigma_data) == (7, 2, 0.5)
    assert (store.mean, store.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert store.class_counts == {"a": 3, "b": 3}


def test_gather_reads_any_rows_in_any_order_across_shards(store_path: Path) -> None:
    wanted = np.array([6, 0, 3, 3, 2, 5, 1])
    images, labels = Store.open(store_path).gather(wanted)
    assert np.array_equal(images, TRAIN[wanted])
    assert labels is not None and np.array_equal(labels, LABELS[wanted])
    assert images.dtype == np.uint8 and images.flags.writeable


def test_held_out_images_are_a_part_of_their_own(store_path: Path) -> None:
    images, labels = Store.open(store_path).gather(np.array([1, 0]), part="holdout")
    assert np.array_equal(images, HELD[[1, 0]])
    assert labels is not None and labels.tolist() == [1, 0]


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    images, labels = Store.open(write_store(tmp_path / "data", classes=())).gather(np.arange(7))
    assert labels is None
    assert np.array_equal(images, TRAIN)


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_out_of_range_is_never_some_other_image(store_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        Store.open(store_path).gather(np.array([0, index]))


def test_an_empty_batch_is_empty(store_path: Path) -> None:
    assert Store.open(store_path).gather(np.array([], np.int64))[0].shape == (0, 4, 5, 3)


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one = Store.open(write_store(tmp_path / "one")).fingerprint
    assert one == Store.open(write_store(tmp_path / "two")).fingerprint
    assert len(one) == 64
    assert one != Store.open(write_store(tmp_path / "three", classes=("a", "c"))).fingerprint
    rewrite(tmp_path / "two", source="elsewhere")
    assert one == Store.open(tmp_path / "two").fingerprint


def test_verify_names_the_changed_shard_and_both_hashes(store_path: Path) -> None:
    store = Store.open(store_path)
    assert store.verify() == []
    shard = store_path / "images-00001.npy"
    before = hashlib.sha256(shard.read_bytes()).hexdigest()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (problem,) = store.verify()
    assert "images-00001.npy" in problem and before[:12] in problem
    assert hashlib.sha256(data).hexdigest()[:12] in problem
    assert problem in failure(store_path)
    assert Store.open(store_path, verify=False).count == 7
    shard.unlink()
    assert "images-00001.npy cannot be read" in store.verify()[0]


def test_missing_folders_and_other_folders_say_what_to_run(store_path: Path) -> None:
    assert "Did you mean 'data'?" in failure(store_path.with_name("dat"))
    photos = store_path.with_name("photos")
    photos.mkdir()
    assert f"diffkit prepare {photos}" in failure(photos)
    (photos / "dataset.json").write_text('{"format": "something else"}')
    assert "not a prepared data set" in failure(photos)


def test_a_newer_version_is_named(store_path: Path) -> None:
    rewrite(store_path, version=3)
    assert "version 3, this one reads 2" in failure(store_path)


@pytest.mark.parametrize("key", ["spec", "count", "mean", "shards", "class_counts"])
def test_an_incomplete_index_is_damage(store_path: Path, key: str) -> None:
    rewrite(store_path, **{key: None})
    assert "dataset.json is incomplete" in failure(store_path)


def test_a_torn_index_is_damage(store_path: Path) -> None:
    text = (store_path / "dataset.json").read_text()
    (store_path / "dataset.json").write_text(text[: len(text) // 2])
    assert "dataset.json cannot be read" in failure(store_path)


@pytest.mark.parametrize("name", ["images-00002.npy", "labels-00001.npy", "holdout-images-00000.npy"])
def test_missing_and_truncated_shards_are_named(store_path: Path, name: str) -> None:
    shard = store_path / name
    whole = shard.read_bytes()
    for kept in (0, 1, 9, 60, len(whole) - 1):
        shard.write_bytes(whole[:kept])
        assert name in failure(store_path)
    shard.write_bytes(whole + b"\0")
    assert name in failure(store_path)
    shard.unlink()
    assert f"{name} is missing" in failure(store_path)


def test_a_shard_of_another_shape_or_type_is_named(store_path: Path) -> None:
    for array in (TRAIN[:3, :, :, :1], TRAIN[:2], TRAIN[:3].astype(np.float32), np.asfortranarray(TRAIN[:3])):
        np.save(store_path / "images-00000.npy", array)
        assert "images-00000.npy" in failure(store_path)


def test_counts_that_do_not_add_up_are_damage(store_path: Path) -> None:
    rewrite(store_path, count=8)
    assert "hold 7 rows, expected 8" in failure(store_path)


def test_a_shard_never_leads_out_of_the_folder(store_path: Path) -> None:
    index = json.loads((store_path / "dataset.json").read_text())
    index["shards"][0]["file"] = "../data/images-00000.npy"
    rewrite(store_path, shards=index["shards"])
    assert "dataset.json is incomplete" in failure(store_path)
