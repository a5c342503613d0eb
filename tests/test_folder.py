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
from diffkit.interfaces import Account, Example, account_of


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


def account(root: Path, **options: object) -> Account:
    return account_of(folder(str(root), **options))


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


def test_an_unreadable_folder_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path, "secret/1.png", "a/1.png")
    scan = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert ids(tmp_path) == ["a/1.png"]
    assert account(tmp_path).skipped == [("secret/", "folder cannot be read: Permission denied")]
    assert "secret: Permission denied" in str(failure(tmp_path / "secret"))
    (tmp_path / "a" / "1.png").unlink()
    assert "secret/: folder cannot be read: Permission denied" in str(failure(tmp_path))


def test_a_zip_is_read_like_a_folder(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", "b/1.png", "a/2.PNG", "loose.png", "notes.txt", "__MACOSX/b/._1.png")
    examples = list(folder(str(path)))
    assert [(e.id, e.label) for e in examples] == [("a/2.PNG", "a"), ("b/1.png", "b"), ("loose.png", None)]
    for example in examples:
        with decoded(example) as image:
            assert image.getpixel((0, 0)) == (9, 8, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


LAYOUTS: list[tuple[list[str], list[str | None], list[str | None]]] = [
    # names, classes, parts
    (["set/a/2.png", "set/b/1.png"], ["a", "b"], [None] * 2),
    (["x/y/z/a/2.png", "x/y/z/b/1.png"], ["a", "b"], [None] * 2),
    (["train/a/1.png", "train/b/1.png", "val/a/1.png"], ["a", "b", "a"], ["train", "train", "holdout"]),
    (["set/Test/a/1.png", "set/Train/a/1.png", "set/Train/b/1.png"], ["a", "a", "b"], ["holdout", "train", "train"]),
    (["test/1.png", "train/1.png", "validation/1.png"], [None] * 3, ["holdout", "train", "holdout"]),
    (["a/train/1.png", "a/valid/1.png", "b/train/1.png"], ["a", "a", "b"], ["train", "holdout", "train"]),
    (["train/set/a/1.png", "train/set/b/1.png", "dev/set/a/1.png"], ["a", "a", "b"], ["holdout", "train", "train"]),
    (["test/a/1.png", "val/b/1.png"], ["a", "b"], [None] * 2),
    (
        ["loose.png", "train/a/1.png", "train/b/1.png", "val/a/1.png"],
        [None, "a", "b", "a"],
        ["train"] * 3 + ["holdout"],
    ),
    (["extra/1.png", "train/1.png", "val/1.png"], ["extra", "train", "val"], [None] * 3),
    (["bus/1.png", "train/1.png"], ["bus", "train"], [None] * 2),
    (["train/a/1.png", "train/b/1.png"], ["a", "b"], [None] * 2),
    (["a/1.png", "loose.png"], [None, None], [None] * 2),
]


@pytest.mark.parametrize(("names", "classes", "parts"), LAYOUTS)
def test_folders_and_archives_of_them_mean_the_same(
    tmp_path: Path, names: list[str], classes: list[str | None], parts: list[str | None]
) -> None:
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(picture())
    packed = zipped(tmp_path / "posix.zip", *names)
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as file:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\")
            file.writestr(info, picture())
    for root in (tmp_path / "folder", packed, tmp_path / "windows.zip"):
        found = list(folder(str(root)))
        assert [each.id for each in found] == sorted(names)
        assert ([each.label for each in found], [each.part for each in found]) == (classes, parts)
        for each in found:
            decoded(each).close()
        assert account(root).remarks == account(packed).remarks


def test_what_the_folders_mean_is_said_and_can_be_said_otherwise(tmp_path: Path) -> None:
    grow(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    (split, classes) = account(tmp_path).remarks
    assert "train/, val/ are taken as a split" in split and "val/ held out" in split and "folder:splits=false" in split
    assert classes.startswith("2 folders name the classes") and "folder:labels=none" in classes
    found = list(folder(str(tmp_path), splits=False))
    assert ([each.label for each in found], [each.part for each in found]) == (["train", "train", "val"], [None] * 3)
    assert labels(tmp_path, splits=False, labels="path") == ["train/a", "train/b", "val/a"]
    assert "labels=path" in account(tmp_path, splits=False).remarks[-1]
    assert labels(tmp_path, labels="none") == [None] * 3
    beside = account(grow(tmp_path / "mixed", "train/1.png", "val/1.png", "z/1.png")).remarks
    assert "train/, val/ count as classes, beside z/" in beside[-1]


def test_a_class_is_the_same_however_its_accents_are_stored(tmp_path: Path) -> None:
    grow(tmp_path, "train/caf\u00e9/1.png", "train/tea/1.png", "val/cafe\u0301/1.png")
    assert labels(tmp_path) == ["caf\u00e9", "tea", "caf\u00e9"]


def test_whatever_is_passed_over_is_counted(tmp_path: Path) -> None:
    grow(
        tmp_path, "a.HEIC", "b.avif", "c.CR2", "d.txt", "e.txt", "e", ".hidden/1.png", "@eaDir/a.jpg/t.jpg", "x/._1.png"
    )
    for name in ("photo", "0a1b", "2024.05.01", "kept.jpg_large", "note.txt", "movie"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" if name == "movie" else picture("JPEG"))
    os.mkfifo(tmp_path / "pipe")
    assert ids(tmp_path) == ["0a1b", "photo"]
    assert refusals(tmp_path) == {}
    found = account(tmp_path)
    assert {name: reason.split(":")[0] for name, reason in found.skipped} == {
        **dict.fromkeys(["a.HEIC", "b.avif", "c.CR2", "movie"], "not a supported format"),
        "2024.05.01": "an image by its content, with the unknown extension .01",
        "kept.jpg_large": "an image by its content, with the unknown extension .jpg_large",
    }
    assert "Other files, left alone: .txt (3), no extension (2)." in found.remarks
    assert any("._1.png (1), .hidden (1), @eaDir (1)" in remark for remark in found.remarks)


def test_what_diffkit_made_is_passed_over_unless_asked_for(tmp_path: Path) -> None:
    grow(tmp_path, "a/1.png", "b/1.png", "made/a/0.png", "made/grid.png", "made/samples.jsonl")
    grow(tmp_path, "runs/r/config.toml", "runs/r/metrics.jsonl", "runs/r/samples/0.png")
    grow(tmp_path, "samples/1.png", "config.toml")
    assert ids(tmp_path) == ["a/1.png", "b/1.png", "samples/1.png"]
    assert [name for name, _ in account(tmp_path).skipped] == ["made/", "runs/r/"]
    assert "generated=true" in account(tmp_path).skipped[0][1]
    assert ids(tmp_path, generated=True) == ["a/1.png", "b/1.png", "made/a/0.png", "samples/1.png"]
    assert ids(tmp_path / "made") == ["a/0.png"]
    assert ids(tmp_path / "runs") == ["r/samples/0.png"]


def test_the_names_in_a_zip_are_those_that_its_packer_meant(tmp_path: Path) -> None:
    path = zipped(tmp_path / "mac.zip", "cafe\u0301.png", "plain.png")
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags + 1] &= ~8  # without the flag that says UTF-8, as macOS writes it
    path.write_bytes(data)
    assert ids(path) == ["cafe\u0301.png", "plain.png"]
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(tmp_path / "twice.zip", "a.png", "a.png")
    assert ids(tmp_path / "twice.zip") == ["a.png"]
    assert "same name" in account(tmp_path / "twice.zip").skipped[0][1]


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
