"""What lies in a folder or an archive besides images: links, special files, strange names, names that point outside."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import stat
import string
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from diffkit.selftest.bench import Bench, Trial, Untestable, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.pictures import bounded, encoded, picture, prepare, stored

NAMES = (
    "-rf.png", "--help.png", "[red]x[bold].png", "new\nline.png", "tab\t.png", "\x1b[31m.png", "\u202egnp.exe.png",
    "caf\u00e9.png", "cafe\u0301.png", "A.png", "a.png", "\U0001f600.png", "x" * 251 + ".png", "nb\u00a0sp.png",
    "n\u202fn.png",
    "line\u2028.png", "{}.png", "%s.png", "$(x).png", "a\\b.png", "con.png", " .png", "..png.png", "\udcff.png",
    "a;b|c.png",
)  # fmt: skip


@row(24, "links, loops, pipes, sockets, folders that look like images, what may not be read")
def special(bench: Bench) -> Iterator[Trial]:
    if os.name == "nt":
        raise Untestable("Windows has other special files")
    return bench.cases(
        loop, dangling, outside, pipe, a_socket, folder_like_an_image, unreadable_file, unreadable_folder
    )


@row(25, "strange file names", full=300)
def names(bench: Bench) -> Iterator[Trial]:
    if os.name == "nt":
        raise Untestable("Windows allows few of these names")
    chance = random.Random(25)
    letters = string.printable.replace("/", "") + "\u00e9\u0301\u202e\u2028\ufeff\udc80\U0001f600"
    made = ("".join(chance.choices(letters, k=chance.randrange(1, 20))) + ".png" for _ in range(10_000))
    return bench.each(named, [(name,) for name in dict.fromkeys((*NAMES, *made)) if not name.startswith(".")])


@row(26, "archives whose members point outside, are links, are encrypted, are many")
def archives(bench: Bench) -> Iterator[Trial]:
    kinds = [
        "../x.png",
        "/tmp/x.png",
        "C:\\x.png",
        "..\\x.png",
        "a/../../x.png",
        "//host/x.png",
        "./x.png",
        "a/./x.png",
    ]
    return bench.each(
        archived, [(name, kind) for name in [*kinds, "link", "encrypted", "many"] for kind in ("zip", "tar")]
    )


def _beside(lab: Lab, room: Path) -> str:
    """`room/in` holds one sound image and something else: the one is prepared, and the other does no harm."""
    (room / "in" / "sound.png").write_bytes(encoded(picture(), "png"))
    outcome = prepare(lab, room)
    if problem := outcome.unlike(0) or bounded(outcome):
        return problem
    found = list(stored(room))
    return "" if found == ["sound.png"] else f"stored {found}"


def loop(lab: Lab, room: Path) -> str:
    """A link to the folder that it lies in."""
    (room / "in").mkdir()
    (room / "in" / "again").symlink_to(room / "in")
    return _beside(lab, room)


def dangling(lab: Lab, room: Path) -> str:
    """A link to nothing."""
    (room / "in").mkdir()
    (room / "in" / "gone.png").symlink_to(room / "nothing.png")
    return _beside(lab, room)


def outside(lab: Lab, room: Path) -> str:
    """A link to a folder outside is not followed."""
    (room / "in").mkdir()
    (room / "in" / "others").symlink_to(lab.images)
    return _beside(lab, room)


def pipe(lab: Lab, room: Path) -> str:
    """A pipe is never opened: it would wait for ever."""
    (room / "in").mkdir()
    os.mkfifo(room / "in" / "pipe.png")
    return _beside(lab, room)


def a_socket(lab: Lab, room: Path) -> str:
    """A socket."""
    (room / "in").mkdir()
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(room / "in")  # the name of a socket must be short
        made.bind("socket.png")
        os.chdir(before)
    return _beside(lab, room)


def folder_like_an_image(lab: Lab, room: Path) -> str:
    """A folder called like an image."""
    (room / "in" / "x.png").mkdir(parents=True)
    return _beside(lab, room)


def unreadable_file(lab: Lab, room: Path) -> str:
    """An image that may not be read."""
    (room / "in").mkdir()
    (room / "in" / "mine.png").write_bytes(encoded(picture(), "png"))
    (room / "in" / "mine.png").chmod(0)
    return _as_nobody(lab, room)


def unreadable_folder(lab: Lab, room: Path) -> str:
    """A folder that may not be read costs itself only, and is named."""
    (room / "in" / "mine").mkdir(parents=True)
    (room / "in" / "mine" / "x.png").write_bytes(encoded(picture(), "png"))
    (room / "in" / "mine").chmod(0)
    return _as_nobody(lab, room)


def _as_nobody(lab: Lab, room: Path) -> str:
    (room / "in" / "sound.png").write_bytes(encoded(picture(), "png"))
    words = ("prepare", "in", "-o", "out", "--size", 24, "--max-rejected", "100%", "--holdout", "0")
    outcome = lab.diffkit(*words, here=room, setup=[Unprivileged()])
    if problem := outcome.unlike(0, "rejected.jsonl"):
        return problem
    if "mine" not in (room / "out" / "rejected.jsonl").read_text():
        return "rejected.jsonl does not name it"
    return "" if list(stored(room)) == ["sound.png"] else f"stored {list(stored(room))}"


class Unprivileged:
    """Give up root's right to read and write whatever it likes, if the process has it. (Linux only.)"""

    def __call__(self) -> None:
        if os.geteuid() or sys.platform != "linux":
            return
        libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this process
        sets = (ctypes.c_uint32 * 6)()
        libc.prctl(28, 0b11, 0, 0, 0)  # PR_SET_SECUREBITS, SECBIT_NOROOT: what it starts does not get them back
        libc.capget(header, sets)
        for place in (0, 1, 2):  # effective, permitted, inheritable: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
            sets[place] &= ~0b110
        libc.capset(header, sets)


def named(lab: Lab, name: str) -> Trial:
    """An image with a strange name is prepared; the terminal never gets the name's control characters."""
    room = lab.room()
    (room / "in").mkdir()
    (room / "in" / name).write_bytes(encoded(picture(), "png"))
    (room / "in" / f"broken{name[-200:]}").write_bytes(b"broken")
    outcome = prepare(lab, room)
    problem = outcome.unlike(0)
    if "\x1b" in outcome.output or "\u202e" in outcome.output:
        problem = "its control characters were printed"
    if not problem and len(stored(room)) != 1:
        problem = f"{len(stored(room))} were stored"
    Lab.clear(room)
    return Trial(repr(name), problem)


def archived(lab: Lab, name: str, kind: str) -> Trial:
    """A member whose name points outside: nothing is ever written there, and the sound member is prepared."""
    room = lab.room()
    source = f"in.{kind}"
    (_zip if kind == "zip" else _tar)(room / source, name)
    before = _listing(lab.folder)
    outcome = prepare(lab, room, source=source)
    problem = outcome.unlike({0, 2, 3}) or bounded(outcome)
    if not problem and outcome.code == 0 and "sound.png" not in stored(room):
        problem = "the sound image is gone"
    if not problem and (made := _listing(lab.folder) - before):
        problem = f"wrote {', '.join(made)}"
    Lab.clear(room)
    return Trial(f"{name} in a {kind}", problem)


def _listing(folder: Path) -> set[str]:
    """What lies beside the rooms, where nothing may appear."""
    found = {path.name for path in folder.iterdir()} | {path.name for path in folder.parent.iterdir()}
    return {name for name in found if name == "x.png"} | ({"/tmp/x.png"} if Path("/tmp/x.png").exists() else set())


def _zip(path: Path, name: str) -> None:
    data = encoded(picture(), "png")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sound.png", data)
        if name == "many":
            for number in range(100_000):
                archive.writestr(f"{number}.txt", b"")
        elif name == "link":
            info = zipfile.ZipInfo("link.png")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        else:
            archive.writestr(zipfile.ZipInfo("x.png" if name == "encrypted" else name), data)
    if name == "encrypted":  # the flag of the last member, where it is and in the directory
        content = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.rindex(signature) + offset] |= 1
        path.write_bytes(content)


def _tar(path: Path, name: str) -> None:
    data = path.with_name("sound.png")
    data.write_bytes(encoded(picture(), "png"))
    with tarfile.open(path, "w") as archive:
        archive.add(data, "sound.png")
        info = archive.gettarinfo(str(data), "x.png")
        if name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        elif name == "many":
            for number in range(20_000):
                archive.addfile(tarfile.TarInfo(f"{number}.txt"))
        else:
            info.name = name
            with data.open("rb") as file:
                archive.addfile(info, file)
    data.unlink()
