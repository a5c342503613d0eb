"""Names that leave diffkit arrive: labels in the file system, paths in a shell, both back again."""

from __future__ import annotations

import os
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest

from conftest import TINY, call_diffkit, write_images
from diffkit.names import LONGEST, bytes_text, command, file_names, shown

NASTY = [
    "plain",
    "two words",
    "it's",
    'a "quote"',
    "$HOME `id` $(id) !! \\n",
    "back\\slash\\",
    "new\nline",
    "tab\tand\x1bescape",
    "~",
    "*?[a]",
    "-x",
    "#no comment",
    "\u732b \U0001f63a caf\u00e9",
    "no\u00a0break\u2028space\u202etxt",
    "=;&|<>(){}",
]


@pytest.mark.parametrize("word", NASTY)
def test_a_printed_command_can_be_pasted(word: str) -> None:
    line = command("sample", Path(word), "--class", word)
    assert line.isprintable()
    script = f"diffkit() {{ printf '%s\\0' \"$@\"; }}; {line}"
    found = subprocess.run(
        ["bash", "-c", script], capture_output=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    path = f"./{word}" if word.startswith("-") else word
    assert found.stdout.decode().split("\0") == ["sample", path, "--class", word, ""]


def test_a_name_that_is_not_utf_8_can_be_pasted_too() -> None:
    name = os.fsdecode(b"caf\xe9")
    found = subprocess.run(
        ["bash", "-c", f"diffkit() {{ printf '%s' \"$2\"; }}; {command('show', Path(name))}"],
        capture_output=True,
        check=True,
    )
    assert found.stdout == b"caf\xe9"


LABELS = [
    *NASTY,
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "a_b",
    "a:b",
    "CON",
    "nul.txt",
    "com1",
    "Cat",
    "cat",
    "cat.",
    "cat ",
    "caf\u00e9",
    "cafe\u0301",
    "stra\u00dfe",
    "STRASSE",
    "samples.jsonl",
    "__MACOSX",
    "x" * 300,
    "x" * 299 + "y",
    "\u732b" * 100,
    "\ud800",
]


def test_every_label_becomes_a_name_of_its_own_that_any_file_system_takes(tmp_path: Path) -> None:
    found = file_names(LABELS, taken=["samples.jsonl"])
    assert list(found) == LABELS
    for name in found.values():
        assert 0 < len(name.encode()) <= LONGEST
        assert name.isprintable() and not re.search(r'[/\\:*?"<>|]|^[-. ]|[. ]$', name), name
        assert not re.fullmatch(r"(?i)(con|nul|com1|samples\.jsonl|__macosx)(\..*)?", name)
        (tmp_path / name).mkdir()
    alike = {unicodedata.normalize("NFKC", name).casefold() for name in found.values()}
    assert len(alike) == len(LABELS)


def test_labels_that_are_names_are_kept_whatever_stands_beside_them() -> None:
    assert file_names(["a/b", "a_b"]) == {"a/b": "a_b-2", "a_b": "a_b"}
    assert file_names(["Cat", "cat"]) == {"Cat": "Cat", "cat": "cat-2"}
    assert file_names(["a b", "\u732b", "x=y,z"]) == {each: each for each in ("a b", "\u732b", "x=y,z")}


def test_values_in_messages_stay_on_a_line() -> None:
    assert shown("soon") == "'soon'" and shown([1, "x"]) == "[1, 'x']"
    assert len(shown("x" * 10_000)) < 100 and len(shown(16**6000)) < 100
    assert "\n" not in shown("a\nb")


def test_what_prepare_takes_for_a_class_sample_writes_and_evaluate_reads(tmp_path: Path) -> None:
    classes = ["a/b", "a_b", "x" * 300, "two=1", "50%, or so", "-n", "con", "[red]"]
    write_images(tmp_path / "images", {"all": 3 * len(classes)})
    rows = [f'all/{index:03d}.png,"{classes[index // 3]}"' for index in range(3 * len(classes))]
    (tmp_path / "table.csv").write_text("\n".join(["file,kind", *rows]) + "\n")
    table = ("--labels", "table.csv", "--class-column", "kind", "--holdout", 0)
    made = call_diffkit("prepare", "images", "-o", "my set", "--size", 12, *table, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "Next: diffkit train 'my set'" in made.stderr
    assert call_diffkit("train", "my set", "--steps", 1, *TINY, cwd=tmp_path).returncode == 0
    chosen = [word for each in classes for word in ("--class", each)]
    made = call_diffkit("sample", "runs/my set", "-o", "out", "-n", 32, "--steps", 1, *chosen, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert len([each for each in (tmp_path / "out").iterdir() if each.is_dir()]) == len(classes)
    made = call_diffkit("evaluate", "out", "--data", "my set", "--per-class", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    mixed = ("--class", "two=1=0.5", "--class", "-n=0.5")
    made = call_diffkit("sample", "runs/my set", "-o", "mixed", "-n", 1, "--steps", 1, *mixed, cwd=tmp_path)
    assert made.returncode == 0, made.stderr


def test_a_file_name_is_printed_as_it_is(tmp_path: Path) -> None:
    """Rich would make signs of :warning: and take [red] for a colour."""
    done = call_diffkit("show", tmp_path / ":warning:[red]")
    assert ":warning:[red]" in done.stderr


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (2**20, "1 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (5 * 2**40, "5120.0 GiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert bytes_text(count) == text
