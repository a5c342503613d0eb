"""The dataset source for folders and zip archives."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from diffkit.datasets import archive
from diffkit.datasets.folder import folder
from diffkit.datasets.imagefile import RejectedImage, open_image
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example


def picture(format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (9, 8, 7)).save(file, format)
    return file.getvalue()


def grow(root: Path, *names: str | bytes) -> Path:
    """Empty files are enough: nothing is opened while looking around."""
    for name in names:
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, picture())
    return path


def ids(root: Path, **options: object) -> list[str | None]:
    return [example.id for example in folder(str(root), **options)]


def labels(root: Path, **options: object) -> list[str | None]:
    return [example.label for example in folder(str(root), **options)]


def decoded(example: Example) -> Image.Image:
    if isinstance(example.image, Path):
        return open_image(example.image)
    assert callable(example.image)
    return example.image()


def refusals(root: Path, **options: object) -> dict[str | None, str]:
    found = {}
    for example in folder(str(root), **options):
        try:
            decoded(example).close()
        except RejectedImage as error:
            found[example.id] = error.reason
    return found


def failure(path: Path, **options: object) -> DiffkitError:
    with pytest.raises(DiffkitError) as caught:
        list(folder(str(path), **options))
    assert caught.value.code == ExitCode.DATA
    return caught.value


def test_images_are_found_in_all_depths_and_in_any_case(tmp_path: Path) -> None:
    names = ["a.JPG", "b.jpeg", "c.Jpe", "d.jfif", "e.PNG", "f.webp", "g.bmp", "h.gif", "i.tif", "x/y/j.TIFF"]
    assert ids(grow(tmp_path, *names, "k.txt", "l.jpg.bak", "jpg")) == names


def test_order_is_that_of_the_bytes_of_relative_names(tmp_path: Path) -> None:
    names = ["é.png", "z.png", "Z.png", "a/b.png", "a.png", "a-b.png", "10.png", "9.png"]
    expected = sorted(names, key=lambda name: name.encode())
    assert ids(grow(tmp_path, *names)) == expected
    assert expected[:3] == ["10.png", "9.png", "Z.png"]


def test_hidden_and_system_files_are_skipped(tmp_path: Path) -> None:
    grow(tmp_path, "a.png", ".b.png", ".cache/c.png", "__MACOSX/d.png", "x/._e.png", "Thumbs.db")
    assert ids(tmp_path) == ["a.png"]


def test_top_level_folders_are_the_classes(tmp_path: Path) -> None:
    grow(tmp_path, "cats/1.png", "cats/old/2.png", "dogs/3.png", "loose.png")
    assert labels(tmp_path) == ["cats", "cats", "dogs", None]
    assert labels(tmp_path, labels="path") == ["cats", "cats/old", "dogs", None]
    assert labels(tmp_path, labels="none") == [None] * 4


def test_fewer_than_two_classes_mean_no_labels(tmp_path: Path) -> None:
    assert labels(grow(tmp_path, "cats/1.png", "cats/2.png", "loose.png")) == [None] * 3


def test_unknown_labels_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DiffkitError, match="Did you mean 'folders'"):
        folder(str(tmp_path), labels="folder")


def test_strange_names_get_ids_that_are_unique_printable_and_json(tmp_path: Path) -> None:
    names: list[str | bytes] = [
        "a\nb.png",
        r"a\nb.png",
        "🌼.png",
        "-rf.png",
        "[red]x.png",
        "\x1b[31m.png",
        "A.png",
        "a.png",
    ]
    names += ["é.png", "e\u0301.png", "x" * 251 + ".png", "عربي.png", b"caf\xe9.png", r"caf\udce9.png"]
    found = ids(grow(tmp_path, *names))
    assert len(set(found)) == len(names)
    for name in found:
        assert name is not None and name.isprintable() and name.encode()
        assert json.loads(json.dumps(name, ensure_ascii=False)) == name
    assert r"caf\udce9.png" in found
    assert found == ids(tmp_path)


def test_a_folder_called_like_an_image_is_a_folder(tmp_path: Path) -> None:
    assert ids(grow(tmp_path, "x.png/1.png")) == ["x.png/1.png"]


def test_links_inside_are_used_once_and_loops_are_cut(tmp_path: Path) -> None:
    grow(tmp_path, "real/1.png")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "same.png").symlink_to(tmp_path / "real" / "1.png")
    for follow in (False, True):
        assert ids(tmp_path, follow_links=follow) == ["real/1.png", "same.png"]


def test_links_leading_outside_are_refused_unless_followed(tmp_path: Path) -> None:
    inside, outside = grow(tmp_path / "in", "a/1.png"), grow(tmp_path / "out", "2.png", "deep/3.png")
    for name in ("1.png", "2.png", "deep/3.png"):
        (inside / "a" / "1.png" if name == "1.png" else outside / name).write_bytes(picture())
    (inside / "b").symlink_to(outside)
    (inside / "c.png").symlink_to(outside / "2.png")
    (outside / "deep" / "back").symlink_to(outside)
    found = refusals(inside)
    assert list(found) == ["b", "c.png"]
    assert all("follow_links" in reason for reason in found.values())
    assert ids(inside, follow_links=True) == ["a/1.png", "b/2.png", "b/deep/3.png", "c.png"]
    assert labels(inside, follow_links=True) == ["a", "b", "b", None]
    assert refusals(inside, follow_links=True) == {}


def test_what_says_image_and_is_none_is_refused_one_by_one(tmp_path: Path) -> None:
    grow(tmp_path, "empty.png", "notes.txt")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "good.png").write_bytes(picture())
    assert refusals(tmp_path) == {
        "broken.png": "a broken link",
        "empty.png": "empty file",
        "fifo.png": "not a regular file",
    }


def test_a_missing_path_suggests_its_sibling(tmp_path: Path) -> None:
    grow(tmp_path, "photos/1.png")
    assert "Did you mean 'photos'?" in str(failure(tmp_path / "phtos"))


def test_useless_paths_are_explained(tmp_path: Path) -> None:
    grow(tmp_path, "one.png", "broken.zip", "empty/.keep", "other/a.heic", "other/b.HEIC", "other/README")
    assert "neither a folder nor a zip" in str(failure(tmp_path / "one.png"))
    assert "not a readable zip" in str(failure(tmp_path / "broken.zip"))
    assert "is empty" in str(failure(tmp_path / "empty"))
    assert ".heic (2), no extension (1)" in str(failure(tmp_path / "other"))


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path, "secret/1.png")
    scan = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert "secret: Permission denied" in str(failure(tmp_path))


def test_a_zip_is_read_like_a_folder(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "b/1.png", "a/2.PNG", "loose.png", "notes.txt", "__MACOSX/b/._1.png")
    examples = list(folder(str(path)))
    assert [(e.id, e.label) for e in examples] == [("a/2.PNG", "a"), ("b/1.png", "b"), ("loose.png", None)]
    for example in examples:
        with decoded(example) as image:
            assert image.getpixel((0, 0)) == (9, 8, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_a_single_folder_around_a_zip_is_no_class(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "set/b/1.png", "set/a/2.png")
    assert labels(path) == ["a", "b"]
    assert labels(path, labels="path") == ["a", "b"]
    assert ids(path) == ["set/a/2.png", "set/b/1.png"]


def test_unsafe_zip_members_are_refused_and_nothing_is_extracted(tmp_path: Path) -> None:
    place = tmp_path / "in" / "x.zip"
    place.parent.mkdir()
    with zipfile.ZipFile(place, "w") as file:
        for name in ("../up.png", "/abs.png", "C:/drive.png", "a/../../b.png", r"..\win.png", "ok.png"):
            file.writestr(name, picture())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    found = refusals(place)
    assert len(found) == 6 and "ok.png" not in found
    assert found.pop("link.png") == "not a supported format: text"
    assert all(reason.startswith("unsafe name") for reason in found.values())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip"]


def test_encrypted_and_oversized_zip_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "x.zip", "a.png", "b.png")
    data = path.read_bytes()
    flags = data.index(b"PK\x01\x02") + 8
    path.write_bytes(data[:flags] + b"\x01\x00" + data[flags + 2 :])
    assert refusals(path) == {"a.png": "encrypted archive member"}
    monkeypatch.setattr(archive, "MAX_BYTES", 10)
    assert refusals(path)["b.png"].startswith("file too large")


def test_a_zip_bomb_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", b"\0" * 50_000_000)
    assert refusals(path) == {"bomb.png": "not a supported format, or damaged at its start"}


def test_a_damaged_zip_member_costs_only_itself(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "a.png", "b.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(data)
    found = refusals(path)
    assert list(found) == ["a.png"]
    assert found["a.png"].startswith("damaged archive member")
