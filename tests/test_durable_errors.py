"""What durable writes, checkpoints and model files do where something is in the way: every branch that is left."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffkit import durable
from diffkit.engine import modelfile
from diffkit.engine.checkpoint import Checkpoint, kept, latest_checkpoint, save_checkpoint, set_aside
from diffkit.engine.modelfile import read_model, read_tensors, write_tensors
from diffkit.errors import DiffkitError, ExitCode


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EIO, "x"), "Cannot write place: Input/output error."),
        (OSError("odd"), "Cannot write place: odd."),
        (OSError(errno.EDQUOT, "x"), "Disk full: need 5 KiB, have"),
    ],
)
def test_failures_are_explained(error: OSError, text: str) -> None:
    with pytest.raises(DiffkitError) as caught, durable.explained(Path("place"), 5 * 1024):
        raise error
    assert text in caught.value.message and caught.value.code == ExitCode.MACHINE


def test_the_space_that_is_free_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert durable.free_space(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_folders_that_another_process_makes_meanwhile_are_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(durable, "sync", synced.append)
    durable.make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and len(synced) == 2

    def slower(path: Path) -> None:
        path.mkdir()
        path.mkdir()

    monkeypatch.setattr(durable, "make_folder", slower)
    durable.make_folders(tmp_path / "c")
    assert (tmp_path / "c").is_dir()

    def file_instead(path: Path) -> None:
        path.touch()
        path.mkdir()

    monkeypatch.setattr(durable, "make_folder", file_instead)
    with pytest.raises(DiffkitError, match="File exists"):
        durable.make_folders(tmp_path / "d")


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    durable.write_lines(file, [{"a": 1}, {"b": "\u2028\x0b"}])
    with file.open("ab") as more:
        more.write(b'[1]\n"text"\n\xff\xfe\n' + b"[" * 100_000 + b"\n" + b'{"c": 3}')
    assert durable.read_lines(file) == [{"a": 1}, {"b": "\u2028\x0b"}, {"c": 3}]
    assert list(durable.lines(file / "inside")) == []


def test_syncing_what_is_not_there_does_nothing_and_what_fails_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.sync_path(tmp_path / "none")
    (tmp_path / "file").touch()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(durable, "sync", fail)
    with pytest.raises(DiffkitError, match="Input/output error"):
        durable.sync_path(tmp_path / "file")


CACHE = "from diffkit import durable\nprint(durable.cache_folder())\nassert durable.cache_folder().is_dir()"


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null", ""])
def test_without_a_cache_there_is_one_that_goes_with_the_process(place: str) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": place, "HOME": "/proc/nothing"}
    done = subprocess.run([sys.executable, "-c", CACHE], env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("diffkit-") and not folder.exists()


def test_a_cache_that_may_not_be_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert durable.cache_folder() == tmp_path / "diffkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert durable.cache_folder() == durable.process_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(durable, "writable", lambda folder: False)
    assert durable.cache_folder() == durable.process_folder() != tmp_path / "diffkit"


def test_a_cache_is_made_with_the_folders_above_it_and_then_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    for _ in range(2):
        assert durable.cache_folder() == tmp_path / "a" / "b" / "diffkit"


def test_a_temporary_folder_that_has_gone_before_its_process_ends_is_not_missed() -> None:
    code = "import shutil\nfrom diffkit import durable\nshutil.rmtree(durable.process_folder())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_files_are_synced_by_their_descriptor_which_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").touch()
    durable.sync_path(tmp_path / "file")
    assert synced == [(tmp_path / "file").stat().st_ino]
    closed: list[int] = []
    monkeypatch.setattr(os, "close", lambda descriptor: closed.append(descriptor))
    durable.sync_folder(tmp_path)
    monkeypatch.undo()
    assert len(closed) == 1
    os.close(closed[0])


def test_a_folder_that_cannot_be_synced_is_the_error_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path) -> None:
        raise OSError(errno.EIO, "x")

    def failing_at_the_end(folder: Path) -> None:
        if folder == tmp_path:
            failing(folder)

    monkeypatch.setattr(durable, "sync_folder", failing)
    with pytest.raises(DiffkitError, match="Input/output error"):
        durable.write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    monkeypatch.setattr(durable, "sync_folder", failing_at_the_end)
    with pytest.raises(DiffkitError, match="Input/output error"), durable.new_folder(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["file", "new"]


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with durable.new_folder(tmp_path / "a" / "b" / "c") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path / "a" / "b" / "c") == ["file"]


def test_where_processes_cannot_be_asked_for_all_of_them_live(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    assert not durable._alive(gone.pid)
    monkeypatch.setattr(os, "name", "nt")
    assert durable._alive(gone.pid)
    monkeypatch.undo()


def stray(folder: Path, process: int, name: str = "set") -> Path:
    place = folder / durable.temporary_name(folder / name).name.replace(f"-{os.getpid()}-", f"-{process}-")
    place.mkdir()
    return place


def test_only_what_surely_has_no_writer_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impossible, other_user, other_name = stray(tmp_path, 10**30), stray(tmp_path, 1), stray(tmp_path, 10**30, "other")
    kill = os.kill

    def forbidden(process: int, number: int) -> None:
        if process == 1:
            raise PermissionError
        kill(process, number)

    monkeypatch.setattr(os, "kill", forbidden)
    durable.remove_stale(tmp_path, "set")
    assert not impossible.exists() and other_user.exists() and other_name.exists()
    durable.remove_stale(tmp_path / "none", "set")


def test_a_long_name_has_a_temporary_one_that_is_found_again(tmp_path: Path) -> None:
    name = "x" * 255
    left = stray(tmp_path, 10**30, name)
    assert len(left.name) < 255 and durable.is_temporary(left.name)
    durable.remove_stale(tmp_path, name)
    assert names(tmp_path) == []


def test_a_folder_is_built_inside_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    moved: list[str] = []
    rename = durable.rename
    monkeypatch.setattr(durable, "rename", lambda source, target: (moved.append(target.name), rename(source, target)))
    with durable.new_folder(Path()) as building:
        for place, name in enumerate(("z", "a")):
            (building / name).write_text(name)
            os.utime(building / name, (place, place))
    assert moved == ["z", "a"] and names(tmp_path) == ["a", "z"]


def test_a_folder_that_another_process_has_put_there_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(DiffkitError, match="written by another process meanwhile") as caught,
        durable.new_folder(tmp_path / "set") as building,
    ):
        (building / "mine").touch()
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "theirs").touch()
    assert caught.value.code == ExitCode.USAGE
    assert names(tmp_path) == ["set"] and names(tmp_path / "set") == ["theirs"]


def test_a_folder_that_cannot_be_renamed_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(durable, "rename", fail)
    with pytest.raises(DiffkitError, match="Input/output error"), durable.new_folder(tmp_path / "set"):
        pass
    assert names(tmp_path) == []


def checkpoint(images: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), value)}, images, frozenset({"w"}), "c")


def test_the_newest_two_checkpoints_stay_and_nothing_that_is_not_finite_comes(tmp_path: Path) -> None:
    for images in (8, 16, 24):
        assert save_checkpoint(tmp_path, checkpoint(images)).name == f"images-{images:012d}"
    assert kept(tmp_path) == 2 and names(tmp_path) == ["images-000000000016", "images-000000000024"]
    for value in (float("nan"), float("inf")):
        with pytest.raises(DiffkitError, match="no longer finite after 32 images") as caught:
            save_checkpoint(tmp_path, checkpoint(32, value))
        assert caught.value.code == ExitCode.NON_FINITE
    found, problems = latest_checkpoint(tmp_path)
    assert found is not None and (found.images_seen, found.config, problems) == (24, "c", {})
    assert kept(tmp_path / "none") == 0 and latest_checkpoint(tmp_path / "none") == (None, {})


def test_a_checkpoint_is_written_once_unless_it_is_damaged(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, checkpoint(8))
    with (target / "state.safetensors").open("rb") as before:  # open, so that no other file gets its number
        save_checkpoint(tmp_path, checkpoint(8))
        assert os.path.samestat(os.fstat(before.fileno()), (target / "state.safetensors").stat())
    (target / "state.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, checkpoint(8))
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and names(tmp_path) == ["images-000000000008"]


def test_a_checkpoint_is_read_back_before_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for images in (8, 16):
        save_checkpoint(tmp_path, checkpoint(images))
    rename = durable.rename

    def damaging(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name == "images-000000000024":
            file = target / "state.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"\0")

    monkeypatch.setattr(durable, "rename", damaging)
    with pytest.raises(DiffkitError, match="checksum"):
        save_checkpoint(tmp_path, checkpoint(24))
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 16 and kept(tmp_path) == 3


def test_a_checkpoint_of_the_beginning_is_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(0))
    found, problems = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 0 and not problems


def test_damaged_checkpoints_are_set_aside_in_place_of_earlier_ones(tmp_path: Path) -> None:
    for images in (8, 16):
        save_checkpoint(tmp_path, checkpoint(images))
    (tmp_path / "damaged-images-000000000016").mkdir()
    (tmp_path / "damaged-images-000000000016" / "earlier").touch()
    damaged = tmp_path / "images-000000000016"
    (damaged / "state.safetensors").write_bytes(b"damaged")
    found, problems = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 8 and list(problems) == [damaged]
    set_aside(problems)
    assert names(tmp_path) == ["damaged-images-000000000016", "images-000000000008"]
    assert names(tmp_path / "damaged-images-000000000016") == ["state.safetensors"]


def test_a_file_that_does_not_say_how_far_it_is_is_no_checkpoint(tmp_path: Path) -> None:
    for header in ({}, {"images_seen": -1}, {"images_seen": "8"}):
        folder = tmp_path / "images-000000000008"
        folder.mkdir(exist_ok=True)
        write_tensors(folder / "state.safetensors", {"w": torch.ones(3)}, header)
        with pytest.raises(DiffkitError, match="does not say how many images") as caught:
            latest_checkpoint(tmp_path)
        assert caught.value.code == ExitCode.MODEL


def test_a_checkpoint_of_a_newer_format_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(8))
    with monkeypatch.context() as newer:
        newer.setattr(modelfile, "VERSION", 99)
        save_checkpoint(tmp_path, checkpoint(16))
    with pytest.raises(DiffkitError, match="format 99") as caught:
        latest_checkpoint(tmp_path)
    assert caught.value.code == ExitCode.MODEL


def test_what_cannot_be_listed_or_deleted_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for images in (8, 16):
        save_checkpoint(tmp_path, checkpoint(images))

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(durable, "remove", fail)
        with pytest.raises(DiffkitError, match=r"Cannot write .*images-000000000008: Input/output error") as caught:
            save_checkpoint(tmp_path, checkpoint(24))
        assert caught.value.code == ExitCode.MACHINE
    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(DiffkitError, match=r"Cannot read .*: Input/output error") as caught:
        kept(tmp_path)
    assert caught.value.code == ExitCode.MACHINE


def test_a_checkpoint_is_not_a_model_nor_is_a_folder(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, checkpoint(8))
    with pytest.raises(DiffkitError, match="not a model, but part of a checkpoint") as caught:
        read_model(target / "state.safetensors")
    assert caught.value.code == ExitCode.MODEL
    with pytest.raises(DiffkitError, match=r"cannot be read \(Is a directory\)"):
        read_tensors(target)


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model"
    write_tensors(file, {"w": torch.ones(3)}, {})
    size = file.stat().st_size
    os.truncate(file, size - 4)
    monkeypatch.setattr(modelfile.os, "fstat", lambda descriptor: SimpleNamespace(st_size=size))
    with pytest.raises(DiffkitError, match="it is truncated"):
        read_tensors(file)


def test_a_file_that_cannot_be_written_aside_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "x")

    for primitive in ("write", "create"):
        with monkeypatch.context() as patch, pytest.raises(DiffkitError, match="Input/output error"):
            patch.setattr(durable, primitive, failing)
            durable.write_aside(tmp_path / "file", b"content")
        assert names(tmp_path) == []


def test_without_syncfs_files_are_published_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    paths = [tmp_path / str(number) for number in range(3)]
    durable.publish({path: durable.write_aside(path, b"content") for path in paths})
    assert names(tmp_path) == ["0", "1", "2"]


@pytest.mark.skipif(sys.platform != "linux", reason="has no syncfs")
def test_only_several_files_have_the_whole_file_system_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(syncfs=written.append))
    for count, calls in ((1, 0), (2, 1)):
        paths = [tmp_path / f"{count}-{number}" for number in range(count)]
        durable.publish({path: durable.write_aside(path, b"content") for path in paths})
        assert len(written) == calls and all(path.read_bytes() == b"content" for path in paths)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(written[0])
