"""What is the machine's or the user's fault is said to be so: never a bug, never a traceback."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, call_diffkit
from diffkit import durable, paths
from diffkit.cli import evaluate
from diffkit.cli.asked import read_noise
from diffkit.cli.failure import as_diffkit_error
from diffkit.compose import sampled
from diffkit.compose.parts import completed, levels
from diffkit.compose.trial import first_use
from diffkit.config import PartChoice, parse_value, read_toml, validated
from diffkit.errors import DiffkitError, ExitCode, nearest_sibling

CAPABILITIES = (0x20080522, 0)  # the version of the kernel's interface, this process
OVERRIDE = 0b110  # of permissions, to write and to read


@pytest.fixture
def forbidden(tmp_path: Path) -> Iterator[None]:
    """Permissions hold for this process too, even if it is root's. `tmp_path / "locked"` is opened in the end."""
    libc, who, held = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(*CAPABILITIES), (ctypes.c_uint32 * 6)()
    if root := os.geteuid() == 0:
        if not hasattr(libc, "capset") or libc.capget(who, held):
            pytest.skip("root may do everything here")
        before = held[0]
        held[0] &= ~OVERRIDE
        libc.capset(who, held)
    yield
    if root:
        held[0] = before
        libc.capset(who, held)
    (tmp_path / "locked").chmod(0o755)


def test_what_may_not_be_read_is_said_to_be_so(tmp_path: Path, forbidden: None) -> None:
    (tmp_path / "locked" / "run").mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    for check in (paths.exists, paths.is_file, paths.is_folder):
        with pytest.raises(DiffkitError, match=r"No permission to read .*locked") as caught:
            check(tmp_path / "locked" / "run")
        assert caught.value.code == ExitCode.MACHINE
        assert not check(tmp_path / "nothing") and not check(tmp_path / "a" / ("x" * 300))
    for words in (
        ("show", "locked/run"),
        ("sample", "locked/run", "-o", "s"),
        ("evaluate", "locked/run"),
        ("report", "locked/run"),
        ("train", "locked/run", "-o", "r"),
        ("prepare", "locked/run", "-o", "d"),
        ("plan", "locked/run"),
        ("ema", "locked/run", "--length", "0.1"),
    ):
        done = call_diffkit(*words, cwd=tmp_path)
        assert (done.returncode, "o permission to read" in done.stderr) == (4, True), (words, done.stderr)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/x"), 4, "Cannot use /data/x: Input/output error"),
        (OSError(errno.ENOTCONN, "?", b"/mnt/a", None, "/mnt/b"), 4, "/mnt/a and /mnt/b: Transport endpoint"),
        (OSError(errno.ELOOP, "?"), 4, "Too many levels of symbolic links"),
        (BrokenPipeError(errno.EPIPE, "?"), 4, "Broken pipe"),
        (MemoryError(), 4, "too little free memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"), 4, "too little free memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 4, "too little free memory"),
        (RecursionError(), 2, "nested too deeply"),
        (OverflowError("int too large to convert to float"), 2, "too large"),
        ("\udce9", 2, "surrogates not allowed"),
    ],
)
def test_what_nobody_foresaw_is_told_apart(error: Exception | str, code: int, words: str) -> None:
    import torch  # noqa: F401

    if isinstance(error, str):
        with pytest.raises(UnicodeEncodeError) as caught:
            error.encode()
        error = caught.value
    found = as_diffkit_error(error)
    assert found is not None and found.code == code and words in found.message
    assert as_diffkit_error(ZeroDivisionError()) is None


def test_input_and_output_errors_in_prepare_name_the_machine(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: object, data: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "write", fails)
    done = call_diffkit("prepare", dataset.parent / "images", "-o", tmp_path / "set", "--size", 12)
    assert done.returncode == 4 and "Input/output error" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_there_is_a_cache_for_the_time_of_the_process(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "no"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    durable.process_folder.cache_clear()
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", "--steps", 1, *TINY)
    assert done.returncode == 0 and done.stderr.count("cannot be written") == 1
    assert durable.process_folder().parent == tmp_path and durable.process_folder().is_dir()
    durable.process_folder.cache_clear()
    code = "from diffkit import durable; print(durable.process_folder())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there and not Path(there).exists()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(durable, "process_folder", lambda: tmp_path)
    assert durable.cache_folder() == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert durable.cache_folder() == tmp_path / "mine" / "diffkit"


def test_samples_that_the_temporary_disk_has_no_room_for_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(sampled._storage((2, 3, 3, 1)), np.memmap)

    def full(descriptor: int, offset: int, length: int) -> None:
        assert length == 18
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    found = sampled._storage((2, 3, 3, 1))
    assert not isinstance(found, np.memmap) and found.shape == (2, 3, 3, 1)


def test_figures_of_a_run_that_may_only_be_read_are_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, record: object) -> None:
        raise DiffkitError(f"Cannot write {path}: Permission denied.", code=ExitCode.MACHINE)

    monkeypatch.setattr(evaluate.durable, "append_line", refused)
    options = ("-n", 20, "--steps", 1, "--device", "cpu")
    done = call_diffkit("evaluate", run, "-o", tmp_path / "there", *options)
    assert done.returncode == 0 and "KD-lite0" in done.stdout
    assert "Not kept" in done.stderr and "Permission denied" in done.stderr
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"evaluation.json", "nearest.png"}


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, forbidden: None) -> None:
    from diffkit.cli.console import require_vacant

    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(DiffkitError, match=r"No permission to write in .*locked"):
        require_vacant(tmp_path / "locked" / "new" / "samples")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffkitError, match="no folder in the file"):
        require_vacant(tmp_path / "file" / "samples")
    require_vacant(tmp_path / "new" / "samples")


def test_films_sheets_reports_and_models_may_go_into_new_folders(run: Path, tmp_path: Path) -> None:
    options = ("--steps", 1, "--device", "cpu")
    film = call_diffkit("interpolate", run, "-o", "a/b/x.gif", "--seeds", "0,1", "--frames", 1, *options, cwd=tmp_path)
    sheet = call_diffkit("trajectory", run, "-o", "c/x.png", "-n", 1, *options, cwd=tmp_path)
    page = call_diffkit("report", run, "-o", "d/e/x.html", "--no-trajectory", cwd=tmp_path)
    assert [done.returncode for done in (film, sheet, page)] == [0, 0, 0]
    assert all((tmp_path / name).is_file() for name in ("a/b/x.gif", "c/x.png", "d/e/x.html"))


def test_an_empty_or_undecodable_argument_is_refused(run: Path, tmp_path: Path) -> None:
    done = call_diffkit("sample", run, "-o", "", cwd=tmp_path)
    assert done.returncode == 2 and "empty argument after -o" in done.stderr
    done = call_diffkit("sample", run, "-o", os.fsdecode(b"caf\xe9"), cwd=tmp_path)
    assert done.returncode == 2 and "not UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_beside_another_says_why(dataset: Path, tmp_path: Path) -> None:
    command = ("train", dataset, "--steps", 1, *TINY)
    assert call_diffkit(*command, cwd=tmp_path).returncode == 0
    done = call_diffkit(*command, "--lr", "3e-4", cwd=tmp_path)
    assert done.returncode == 0
    assert "A new run, runs/set-2: runs/set was begun with train.lr = 0.0" in " ".join(done.stderr.split())
    assert "not 0.0003" in done.stderr
    again = call_diffkit(*command, "--lr", "3e-4", cwd=tmp_path)
    assert again.returncode == 0 and "A new run" not in again.stderr


SETTINGS = [
    "train=5",
    "train.lr=nan",
    "train.clip=inf",
    "train.warmup_images=" + "9" * 30,
    "train.seed=0x" + "f" * 6000,
    "train.seed=" + "9" * 6000,
    "train.lr=" + "[" * 2000,
    "scheduler=5",
    "noise.s_max=1e300",
    "sample.guidance=1e300",
    "sample.steps=1e9",
    "backbone.width=0",
    "sample.sampler='adaptive:tolerance=1e-30'",
    "sample.scheduler='karras:rho=0'",
]
PARTS = [
    ("--scheduler", "karras:rho=0"),
    ("--scheduler", "karras:rho=nan"),
    ("--scheduler", "lognormal:std=0"),
    ("--scheduler", "sigmoid:tau=0"),
    ("--scheduler", "loglinear:sigma_min=-1"),
    ("--prediction", "edm:sigma_data=0"),
    ("--prediction", "edm:sigma_data=1e300"),
    ("--backbone", "unet:width=0"),
    ("--backbone", "unet:multipliers=[]"),
    ("--weighting", "p2:k=0,gamma=-1e9"),
    ("--task", "super-resolution:factor=0"),
    ("--task", "super-resolution:factor=99999999999999999999"),
    ("--batch-size", "\u00b2"),
    ("--time", "9" * 400 + "h"),
    ("--steps", "1" + "0" * 400),
    ("--epochs", "nan"),
    ("--size", "99999999999"),
]


@pytest.mark.parametrize(
    "options", [*(("--set", each) for each in SETTINGS), *PARTS], ids=lambda each: " ".join(each)[:40]
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    dataset: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", "--device", "cpu", *options)
    assert done.returncode == 2, done.stderr
    assert "Bug" not in done.stderr and len(done.stderr) < 1000
    assert not (tmp_path / "run").exists()


def test_a_network_that_the_memory_cannot_hold_is_refused_before_it_is_made(dataset: Path, tmp_path: Path) -> None:
    command = ("train", dataset, "-o", tmp_path / "run", "--device", "cpu")
    for width, code, word in ((8192, 4, "GiB of memory to train"), (10**12, 2, "too large")):
        done = call_diffkit(*command, "--backbone", f"unet:width={width},multipliers=[4,4,4]")
        assert done.returncode == code and word in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--sampler", "adaptive:tolerance=0"),
        ("--sampler", "ancestral:eta=nan"),
        ("--scheduler", "karras:rho=0"),
        ("--steps", "1000000000000000000000000000000"),
        ("-n", "1000000000000"),
        ("--seed", "9" * 30),
        ("--guidance", "nan"),
        ("--guidance", "1e300"),
        ("--class", "high=nan"),
        ("--guidance-interval", "nan,nan"),
    ],
    ids=" ".join,
)
def test_samples_that_cannot_be_made_are_refused(run: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    done = call_diffkit("sample", run, "-o", tmp_path / "out", "--device", "cpu", *options)
    assert done.returncode == 2 and "Bug" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_any_text_of_settings_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbfpreset = 'tiny'\n")  # as Windows' editors save it
    assert read_toml(file) == {"preset": "tiny"}
    wrong = {
        b"a = " + b"[" * 5000: "nested too deeply",
        b"a = " + b"9" * 6000: "not valid TOML",
        b"\xff\xfe\x00": "not valid TOML",
        b"#" * (2**20 + 1): "larger than 1 MiB",
    }
    for content, words in wrong.items():
        file.write_bytes(content)
        with pytest.raises(DiffkitError, match=words):
            read_toml(file)
    with pytest.raises(DiffkitError, match="Is a directory"):
        read_toml(tmp_path)
    with pytest.raises(DiffkitError, match="too large"):
        parse_value("9" * 6000)


def test_a_part_that_ends_the_process_when_it_is_tried_is_named() -> None:
    with (
        pytest.raises(DiffkitError, match="sampler sly cannot be used: it ends the process"),
        first_use("samplers", PartChoice(name="sly")),
    ):
        sys.exit(0)


def test_a_schedule_that_turns_back_is_refused() -> None:
    settings = validated({"noise": {"s_max": 40.0}})
    choice, schedule = completed("schedules", PartChoice.model_validate("linear:beta_min=5,beta_max=-3"))
    with pytest.raises(DiffkitError, match="not rising numbers above 0"):
        levels(choice, schedule, settings)


def test_noise_is_read_no_further_than_its_header_unless_it_fits(tmp_path: Path) -> None:
    path, shape = tmp_path / "noise.npy", (1, 4, 4)
    noise = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    np.save(path, noise)
    assert np.array_equal(read_noise(path, shape).numpy(), noise)
    content = path.read_bytes()
    noise[1, 0, 2, 3] = np.nan
    np.save(tmp_path / "nan.npy", noise)
    for refused, words in (
        (content.replace(b"(2, 1, 4, 4)", b"(999999999999999, 1, 4, 4)", 1), "is damaged or not"),
        (content[:-1], "is damaged or not"),
        (b"<html></html>", "is damaged or not"),
        ((tmp_path / "nan.npy").read_bytes(), "not finite"),
    ):
        path.write_bytes(refused)
        with pytest.raises(DiffkitError, match=words):
            read_noise(path, shape)
    with pytest.raises(DiffkitError, match="cannot be read: Is a directory"):
        read_noise(tmp_path, shape)


def test_a_link_that_leads_nowhere_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to("gone")
    assert nearest_sibling(tmp_path / "photos") == "It is a link to 'gone', which cannot be reached. "
    assert nearest_sibling(tmp_path / "photo") == "Did you mean 'photos'? "
