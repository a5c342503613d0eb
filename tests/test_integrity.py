"""Damage is found before anything is done with what is damaged: in models, checkpoints and prepared data sets."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY, call_diffkit
from diffkit.engine.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from diffkit.engine.modelfile import Newer, read_model, read_model_header, read_tensors, write_tensors
from diffkit.engine.store import Store
from diffkit.errors import DiffkitError, ExitCode

GOLDEN = Path(__file__).parent / "golden"
HEADER = {
    "settings": {},
    "spec": {"channels": 3, "height": 8, "width": 8, "classes": ["cat", "dög"], "image_channels": 0, "dtype": "uint8"},
    "mean": [0.1, -0.2, 0.3],
    "images_seen": 128,
}


def code_of(action: Callable[[], object]) -> ExitCode | None:
    """The exit code of the error that an action raises; None if it raises none."""
    try:
        action()
    except DiffkitError as error:
        return error.code
    return None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every layout of tensors: of several types, a scalar, an empty one."""
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(3), "c": torch.randn(4).bfloat16(), "d": torch.tensor(1.5)}
    write_tensors(path, {**tensors, "e": torch.zeros(0, 3)}, HEADER)
    return path


def test_the_checksum_is_that_of_the_whole_file(model: Path) -> None:
    content = model.read_bytes()
    digits = re.search(rb'"sha256":"([0-9a-f]{64})"', content)
    assert digits is not None
    plain = content[: digits.start(1)] + b"0" * 64 + content[digits.end(1) :]
    assert hashlib.sha256(plain).hexdigest().encode() == digits[1]
    assert read_tensors(model)[1]["sha256"].encode() == digits[1]
    for name, tensor in load_file(model).items():
        assert torch.equal(read_model(model)[0][name], tensor)


def test_every_flipped_bit_of_a_model_is_found(model: Path) -> None:
    content, missed = bytearray(model.read_bytes()), []
    for place in range(len(content)):
        for bit in range(8) if place < 120 else [place % 8]:
            content[place] ^= 1 << bit
            model.write_bytes(content)
            if code_of(lambda: read_model_header(model)) != ExitCode.MODEL:
                missed.append((place, bit))
            content[place] ^= 1 << bit
    assert missed == []
    model.write_bytes(content)
    assert read_model_header(model)["images_seen"] == 128


def test_a_truncated_or_longer_model_is_refused(model: Path) -> None:
    content = model.read_bytes()
    for damaged in [content[:length] for length in (0, 1, 7, 8, 9, 100, len(content) - 1)] + [content + b"\0"]:
        model.write_bytes(damaged)
        assert code_of(lambda: read_model(model)) == ExitCode.MODEL


def safetensors_with(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def format_1(values: object, tensors: dict[str, object] | None = None, data: bytes = b"") -> bytes:
    """A file of format 1, whose checksum covers no header."""
    index = {"__metadata__": {"diffkit": json.dumps(values)}, **(tensors or {})}
    return safetensors_with(json.dumps(index).encode(), data)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
EMPTY = hashlib.sha256().hexdigest()
GOOD = {**HEADER, "version": 1, "sha256": EMPTY}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_with(b"{}"),
        safetensors_with(b"{}", length=2**63),
        safetensors_with(b"[" * 100_000),
        safetensors_with(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        safetensors_with(b'{"__metadata__": null}'),
        safetensors_with(b'{"__metadata__": {"diffkit": 3}}'),
        safetensors_with(b"\xff" * 64),
        safetensors_with(b" " * (2**23 + 8)),
        format_1([]),
        format_1({**GOOD, "version": "1"}),
        format_1({**GOOD, "version": 1.5}),
        format_1({**GOOD, "sha256": None}),
        format_1({**GOOD, "spec": []}),
        format_1({**GOOD, "spec": {**HEADER["spec"], "height": "8"}}),  # type: ignore[dict-item]
        format_1({**GOOD, "spec": {**HEADER["spec"], "height": 0}}),  # type: ignore[dict-item]
        format_1({**GOOD, "spec": {**HEADER["spec"], "classes": "cat"}}),  # type: ignore[dict-item]
        format_1({**GOOD, "spec": {**HEADER["spec"], "classes": ["a", "a"]}}),  # type: ignore[dict-item]
        format_1({**GOOD, "mean": [0.0]}),
        format_1({**GOOD, "mean": [0.0, float("nan"), 0.0]}),
        format_1({**GOOD, "mean": ["0", 0.0, 0.0]}),
        format_1({**GOOD, "images_seen": -1}),
        format_1({**GOOD, "images_seen": 10.5}),
        format_1({**GOOD, "settings": 7}),
        format_1(GOOD, {"a": ONE}),
        format_1(GOOD, {"a": {**ONE, "dtype": "F99"}}, b"1234"),
        format_1(GOOD, {"a": {**ONE, "shape": [-1]}}, b"1234"),
        format_1(GOOD, {"a": {**ONE, "shape": [2**62, 4]}}, b"1234"),
        format_1(GOOD, {"a": {**ONE, "shape": "1"}}, b"1234"),
        format_1(GOOD, {"a": {**ONE, "data_offsets": [4, 0]}}, b"1234"),
        format_1(GOOD, {"a": ONE, "b": ONE}, b"1234"),
        format_1(GOOD, {"a": 5}, b"1234"),
        format_1(GOOD, data=b"more"),
    ],
)
def test_a_malformed_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert code_of(lambda: read_model(path)) == ExitCode.MODEL


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(format_1(GOOD))
    assert read_model(path)[0] == {}
    text = json.dumps(GOOD)
    for twice in (text[:-1] + ', "images_seen": 5}', text[:-1] + ', "mean": [0, 0, 0]}'):
        path.write_bytes(safetensors_with(json.dumps({"__metadata__": {"diffkit": twice}}).encode()))
        assert code_of(lambda: read_model(path)) == ExitCode.MODEL


def test_a_file_of_another_program_and_a_newer_format_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DiffkitError, match=r"safetensors file, but not one of diffkit's"):
        read_model(path)
    with monkeypatch.context() as patch:
        patch.setattr("diffkit.engine.modelfile.VERSION", 3)
        write_tensors(path, {}, HEADER)
    with pytest.raises(Newer, match="of format 3; this diffkit reads up to 2"):
        read_model(path)


def test_a_checkpoint_of_a_newer_format_is_neither_passed_over_nor_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, Checkpoint({"a": torch.zeros(2)}, 8))
    with monkeypatch.context() as patch:
        patch.setattr("diffkit.engine.modelfile.VERSION", 3)
        folder = save_checkpoint(tmp_path, Checkpoint({"a": torch.zeros(2)}, 16))
        content = (folder / "state.safetensors").read_bytes()
        save_checkpoint(tmp_path, Checkpoint({"a": torch.zeros(2)}, 16))
    (folder / "state.safetensors").write_bytes(content)
    with pytest.raises(Newer, match="format 3"):
        latest_checkpoint(tmp_path)


def test_a_users_copy_of_a_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    copies = [tmp_path / "images-000000000008 copy", tmp_path / "images-best"]
    for seen in (8, 16, 24, 32):
        save_checkpoint(tmp_path, Checkpoint({"a": torch.full((2,), float(seen))}, seen))
        if seen == 8:
            for copy in copies:
                shutil.copytree(tmp_path / "images-000000000008", copy)
    (copies[1] / "state.safetensors").write_bytes(b"damaged")
    checkpoint, problems = latest_checkpoint(tmp_path)
    assert checkpoint is not None and (checkpoint.images_seen, problems) == (32, {})
    own = {"images-000000000024", "images-000000000032"}
    assert {path.name for path in tmp_path.iterdir()} == own | {copy.name for copy in copies}


def test_flipped_bits_of_a_checkpoint_lead_to_the_one_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for seen in (8, 16):
        save_checkpoint(tmp_path, Checkpoint({"network.a": torch.randn(40)}, seen, config="0" * 64))
    file = tmp_path / "images-000000000016" / "state.safetensors"
    content, draw = file.read_bytes(), random.Random(0)
    for place in draw.sample(range(len(content)), 150):
        flip(file, place, draw.randrange(8))
        checkpoint, problems = latest_checkpoint(tmp_path)
        assert checkpoint is not None and checkpoint.images_seen == 8
        assert list(problems) == [file.parent]
        file.write_bytes(content)
    checkpoint, problems = latest_checkpoint(tmp_path)
    assert checkpoint is not None and (checkpoint.images_seen, problems) == (16, {})


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_of_a_prepared_set_is_found(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(dataset, copy)
    draw, missed = random.Random(1), []
    for file in sorted(copy.iterdir()):
        content = file.read_bytes()
        for place in draw.sample(range(len(content)), min(len(content), 120)):
            bit = draw.randrange(8)
            flip(file, place, bit)
            if code_of(lambda: Store.open(copy)) != ExitCode.DATA:
                missed.append((file.name, place, bit))
            file.write_bytes(content)
    assert missed == []
    assert Store.open(copy).count + Store.open(copy).holdout_count == 60


def test_training_refuses_data_that_changed_before_the_first_step(dataset: Path, tmp_path: Path) -> None:
    copy, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(dataset, copy)
    index = (copy / "dataset.json").read_text()
    mean = json.loads(index)["mean"][0]
    for name, old, new in (("dataset.json", f"{mean}", f"{mean + 0.5}"), ("examples.jsonl", "high", "tall")):
        before = (copy / name).read_text()
        (copy / name).write_text(before.replace(old, new, 1))
        done = call_diffkit("train", copy, "-o", run, "--steps", 1, *TINY)
        assert done.returncode == ExitCode.DATA and name in done.stderr
        (copy / name).write_text(before)
    flip(copy / "labels-00000.npy", 128 + 8 * 3, 0)
    done = call_diffkit("train", copy, "-o", run, "--steps", 1, *TINY)
    assert done.returncode == ExitCode.DATA and "labels-00000.npy has changed" in done.stderr
    assert not run.exists()


def test_a_model_with_weights_that_are_not_finite_is_refused(run: Path, tmp_path: Path) -> None:
    tensors, header = read_model(run / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for value in (float("nan"), float("inf")):
        write_tensors(tmp_path / "m.safetensors", {**tensors, name: torch.full_like(tensors[name], value)}, header)
        done = call_diffkit("sample", tmp_path / "m.safetensors", "-o", tmp_path / "out", "-n", 1, "--steps", 1)
        assert done.returncode == ExitCode.MODEL and "not finite" in done.stderr


def test_what_the_first_version_wrote_is_read(tmp_path: Path) -> None:
    old = tmp_path / "v1"
    shutil.copytree(GOLDEN / "v1", old)
    store = Store.open(old / "data")
    assert (store.count, store.spec.classes) == (12, ("cat", "dog"))
    assert store.gather(np.arange(12))[0].sum() == 298_668
    assert call_diffkit("show", old / "data", "--verify").returncode == 0
    assert call_diffkit("sample", old / "run", "-o", old / "s", "-n", 2, "--steps", 3).returncode == 0
    options = ("--backbone", "unet:width=4,multipliers=[1],blocks=1,attention=0", "--device", "cpu")
    done = call_diffkit("train", old / "data", "-o", old / "run", "--steps", 6, "--batch-size", 4, *options, cwd=old)
    assert done.returncode == 0, done.stderr
    assert "going on from 16 images" in done.stderr
    flip(old / "run" / "model.safetensors", 20_000, 0)
    flip(old / "data" / "images-00000.npy", 2_000, 0)
    assert code_of(lambda: read_model(old / "run" / "model.safetensors")) == ExitCode.MODEL
    assert code_of(lambda: Store.open(old / "data")) == ExitCode.DATA
