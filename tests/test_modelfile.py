"""The format of model files, byte by byte: what is written, and what each malformed file is said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkit import durable
from diffkit.checksum import ZEROS, sealed
from diffkit.engine import modelfile
from diffkit.engine.modelfile import LARGEST_HEADER, read_tensors, write_tensors
from diffkit.errors import DiffkitError, ExitCode


def made(path: Path, entries: dict[str, Any], data: bytes, version: object = modelfile.VERSION) -> Path:
    """A file of these tensors, whose checksum is right."""
    metadata = {"sha256": ZEROS.decode(), "diffkit": json.dumps({"version": version})}
    head = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(sealed(len(head).to_bytes(8, "little") + head, [memoryview(data)]) + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path, words: str) -> str:
    with pytest.raises(DiffkitError) as caught:
        read_tensors(path)
    assert caught.value.code == ExitCode.MODEL
    assert words in caught.value.message
    return caught.value.message


def test_names_are_utf8_and_the_data_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for length in range(8):
        path = tmp_path / "file"
        write_tensors(path, {"\u00fc" + "n" * length: torch.ones(2)}, {"note": "\u00fc"})
        data = path.read_bytes()
        assert data.count("\u00fc".encode()) == 2 and int.from_bytes(data[:8], "little") % 8 == 0
        tensors, values = read_tensors(path)
        assert list(tensors) == ["\u00fc" + "n" * length] and values["note"] == "\u00fc"


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, {"a": 1})
    assert read_tensors(tmp_path / "file")[0] == {}


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    own = durable.temporary_name(tmp_path / "file")
    fields = own.name.split("-")
    (tmp_path / "-".join([fields[0], str(gone.pid), *fields[2:]])).touch()
    write_tensors(tmp_path / "file", {"w": torch.ones(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_length_of_a_header_has_bounds(tmp_path: Path) -> None:
    path, words = tmp_path / "file", "it is truncated or not a safetensors file"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(path, "not one of diffkit's")
    path.write_bytes((1).to_bytes(8, "little") + b"{}")
    refused(path, words)
    path.write_bytes((3).to_bytes(8, "little") + b"{}")
    refused(path, words)
    with path.open("wb") as file:
        file.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(LARGEST_HEADER + 1000)
    assert LARGEST_HEADER == 8 * 2**20
    refused(path, words)


def test_a_checksum_that_differs_is_blamed_on_the_format_only_where_that_is_newer(tmp_path: Path) -> None:
    for version in (modelfile.VERSION, 99):
        path = made(tmp_path / "file", {"w": entry(0, 4, [1])}, b"abcd", version)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        message = refused(path, "do not match its checksum")
        assert ("of format 99" in message) == (version == 99)


@pytest.mark.parametrize("version", ["2", 1.0, None])
def test_a_version_is_a_whole_number(tmp_path: Path, version: object) -> None:
    refused(made(tmp_path / "file", {}, b"", version), "its header is damaged (its version)")


@pytest.mark.parametrize(
    ("entries", "size", "words"),
    [
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, 12, "b lies at bytes 8 to 12, which does not fit"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b lies at bytes 4 to 12, which does not fit"),
        ({"a": entry(0, 8, [1])}, 8, "a lies at bytes 0 to 8, which does not fit"),
        ({"a": entry(0, 2, [1], "F16"), "b": entry(2, 6, [1])}, 6, "b lies at bytes 2 to 6, which does not fit"),
        ({"a": entry(0, 8, [2])}, 4, "it is truncated: its tensors take 8 bytes, and it holds 4"),
        ({"a": entry(0, 4, [1])}, 8, "it is too long: its tensors take 4 bytes, and it holds 8"),
        ({"a": entry(0, 4, [-1])}, 4, "a is of type F32 and shape [-1]"),
        ({"a": entry(0, 4, [1], "F31")}, 4, "a is of type F31 and shape [1]"),
        ({"a": {**entry(0, 4, [1]), "dtype": 3}}, 4, "its header is damaged (a.dtype: "),
    ],
)
def test_tensors_fill_the_data(tmp_path: Path, entries: dict[str, Any], size: int, words: str) -> None:
    refused(made(tmp_path / "file", entries, bytes(size)), words)


def test_a_header_that_is_no_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((8).to_bytes(8, "little") + b"{,      ")
    refused(tmp_path / "file", "its header is damaged (JSONDecodeError: ")
