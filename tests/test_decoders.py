"""Decoding within bounds: damaged, slow and crashing files cost themselves only, and no process stays behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from diffkit.datasets.archive import members
from diffkit.datasets.folder import folder
from diffkit.datasets.imagefile import FORMATS, RejectedImage
from diffkit.engine import decoder_process
from diffkit.engine import decoders as decoders_module
from diffkit.engine.decoders import Decoders
from diffkit.engine.decoding import Decoded, Frame, decode
from diffkit.engine.prepare import Finished, PrepareOptions, prepare
from diffkit.errors import DiffkitError, ExitCode
from imagefiles import chunk, damaged, png

FRAME = Frame(3, 16, 16)
KINDS = {
    "png": ("PNG", {}),
    "turned.png": ("PNG", {"turned": True}),
    "jpg": ("JPEG", {"turned": True}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
}


def photo(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(format: str, turned: bool = False, **options: object) -> bytes:
    if turned:
        exif = Image.Exif()
        exif[274] = 6
        options["exif"] = exif
    file = io.BytesIO()
    photo().save(file, format, **options)
    return file.getvalue()


def lines(path: Path) -> dict[str, dict[str, object]]:
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["id"]: record for record in records}


def prepared(source: Path, out: Path, **options: object) -> Finished:
    chosen = {"holdout": 0.0, "max_rejected": 1.0, "workers": 2, **options}
    *_, finished = prepare(folder(str(source)), out, PrepareOptions(16, 16, **chosen))
    assert isinstance(finished, Finished)
    return finished


def test_damaged_files_are_stored_exactly_if_pillow_decodes_them(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(40):
        for kind, (format, options) in KINDS.items():
            (files / f"{number:02d}.{kind}").write_bytes(damaged(encoded(format, **options), number))
    script = (
        "import sys, warnings; from pathlib import Path; from PIL import Image; warnings.simplefilter('ignore')\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: Image.open(path, formats=sys.argv[2:]).load(); print(path.name)\n"
        "    except Exception: pass\n"
    )
    command = [sys.executable, "-c", script, str(files), *FORMATS]
    decodable = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    prepared(files, tmp_path / "out")
    assert sorted(lines(tmp_path / "out" / "examples.jsonl")) == decodable
    assert 40 < len(decodable) < 320
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 360 - len(decodable)


def test_files_and_members_are_decoded_in_a_process_as_they_are_here(tmp_path: Path) -> None:
    names = []
    for number, (kind, (format, options)) in enumerate(KINDS.items()):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(encoded(format, **options))
        names.append(path)
    strange = tmp_path / "caf\u00e9 \U0001f431\n.png"
    strange.write_bytes(encoded("PNG"))
    bytes_name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    bytes_name.write_bytes(encoded("PNG"))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            for path in names:
                archive.write(path, f"{method}/{path.name}", method)
    inside = [entry.image for entry in members(tmp_path / "all.zip").entries]
    with Decoders(2) as decoders:
        every = [*names, strange, bytes_name, *inside]
        found = list(decoders.decode_all((image, FRAME) for image in every))
    assert len(found) == 11 + 4 * len(names)
    for image, each in zip(every, found, strict=True):
        here = decode(image, FRAME)
        assert np.array_equal(each.pixels, here.pixels) and each[1:] == here[1:]


def helper(folder: Path) -> str:
    """An interpreter for the decoder process in which decoding a file called crash, hang or loop does just that."""
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from diffkit.engine import decoder_process\n"
        "real = decoder_process.decode\n"
        "def decode(image, frame):\n"
        "    name = image.name\n"
        "    if 'crash' in name: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if 'once' in name and not image.with_suffix('.tried').exists():\n"
        "        image.with_suffix('.tried').touch()\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if 'hang' in name: time.sleep(600)\n"
        "    while 'loop' in name: pass\n"
        "    return real(image, frame)\n"
        "decoder_process.decode = decode\n"
        "sys.argv = [sys.argv[0], *sys.argv[3:]]\n"
        "decoder_process.main()\n"
    )
    script.chmod(0o755)
    return str(script)


def test_files_that_crash_hang_or_loop_cost_themselves_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(12):
        photo(number).save(files / f"{number:02d}.png")
    for name in ("03-crash", "05-hang", "07-loop"):
        photo().save(files / f"{name}.png")
    monkeypatch.setattr(sys, "executable", helper(tmp_path))
    monkeypatch.setattr(decoders_module, "SECONDS", 1)
    monkeypatch.setattr(decoders_module, "PATIENCE", 6)
    written = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        assert prepared(files, out, workers=workers).count == 12
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert {name: record["reason"] for name, record in lines(tmp_path / "out1" / "rejected.jsonl").items()} == {
        "03-crash.png": "the decoder crashed on it: SIGSEGV",
        "05-hang.png": "no answer: reading it takes more than 6 s",
        "07-loop.png": "too much work: decoding it takes more than 1 s",
    }


def test_each_image_gets_a_second_try_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{name}.png" for name in ("0-crash", "1-once", "2-once", "3")]
    for file in files:
        photo().save(file)
    monkeypatch.setattr(sys, "executable", helper(tmp_path))
    with Decoders(1) as decoders:
        first, *others = decoders._take_turn([(file, FRAME) for file in files])[0]
    assert str(first) == "the decoder crashed on it: SIGSEGV"
    for each in others:
        assert isinstance(each, Decoded) and np.array_equal(each.pixels, decode(files[-1], FRAME).pixels)


def test_no_answer_goes_to_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error here while a process still has an image to answer for: nobody else gets that answer."""
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        photo(number).save(file)
    read_answer = decoder_process.read_answer
    with Decoders(1) as decoders, monkeypatch.context() as patch:
        patch.setattr(decoder_process, "read_answer", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            list(decoders.decode_all([(files[0], FRAME)]))
        patch.setattr(decoder_process, "read_answer", read_answer)
        found = decoders.decode(files[2], FRAME)
    assert np.array_equal(found.pixels, decode(files[2], FRAME).pixels)


def test_a_process_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    with Decoders(1) as decoders:
        first = decoders.decode(tmp_path / "a.png", FRAME)
        os.kill(decoders._processes._idle[0]._process.pid, signal.SIGKILL)
        second = decoders.decode(tmp_path / "a.png", FRAME)
    assert np.array_equal(first.pixels, second.pixels)


def test_a_program_without_standard_error_decodes_as_any_other(tmp_path: Path) -> None:
    """The process inherits nothing there, so that the descriptor is free for whatever it opens first."""
    photo().save(tmp_path / "a.png")
    code = (
        "import os\nos.close(2)\n"
        "from pathlib import Path\nfrom diffkit.engine.decoders import Decoders\n"
        "from diffkit.engine.decoding import Frame\n"
        "with Decoders(1) as decoders:\n"
        "    found = decoders.decode(Path('a.png'), Frame(3, 16, 16))\n"
        "os.write(1, found.pixels.tobytes())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=False, timeout=25)
    assert done.stdout == decode(tmp_path / "a.png", FRAME).pixels.tobytes()


def test_a_process_that_cannot_start_is_the_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo().save(tmp_path / "a.png")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(DiffkitError, match=r"could not be started \(exit status 3\)") as caught:
        prepared(tmp_path, tmp_path / "out")
    assert caught.value.code == ExitCode.MACHINE and not (tmp_path / "out").exists()


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(each) for each in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: partial[bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_no_process_outlives_the_one_that_asked(tmp_path: Path, sent: int, code: int) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(3):
        photo(number).save(files / f"{number}-hang.png")
    start = f"import sys; sys.executable = {helper(tmp_path)!r}; from diffkit.cli import main; main()"
    command = [sys.executable, "-c", start, "prepare", str(files), "-o", str(tmp_path / "out"), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert until(partial(lambda: len(children(process.pid)) == 2 or process.poll() is not None))
        decoding = children(process.pid)
        time.sleep(0.5)
        process.send_signal(sent)
        assert process.wait(timeout=10) == code
    assert len(decoding) == 2 and until(partial(lambda: not any(map(alive, decoding))), 5)
    assert sent == signal.SIGKILL or sorted(path.name for path in tmp_path.iterdir()) == ["files", "python"]


def bomb(path: Path, width: int, height: int, color: int, row: bytes) -> Path:
    """A PNG of equal rows."""
    import zlib

    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    file = png(width, height, 8, color, b"").getvalue()
    empty = chunk(b"IDAT", zlib.compress(b""))
    path.write_bytes(file.replace(empty, chunk(b"IDAT", packed)))
    return path


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory, so that the images can be smaller: what fits is decoded, what does not fit is refused."""
    monkeypatch.setattr(decoders_module, "MEMORY", 100 * 2**20)
    fits = bomb(tmp_path / "fits.png", 2000, 1500, 6, bytes([200, 100, 50, 255]) * 2000)
    large = bomb(tmp_path / "large.png", 5000, 5000, 6, bytes(4) * 5000)
    text = tmp_path / "text.png"
    text.write_bytes(png(2, 2, 8, 2, b"\0" * 14, chunk(b"tEXt", b"Comment\0" + b"x" * 100_000_000)).getvalue())
    with Decoders(1) as decoders:
        found = decoders.decode(fits, FRAME)
        assert (found.pixels == [200, 100, 50]).all() and (found.width, found.height) == (2000, 1500)
        for path in (large, text):
            with pytest.raises(RejectedImage, match="too large: decoding it takes more than 100 MiB of memory"):
                decoders.decode(path, FRAME)
        assert len(decoders._processes._idle) == 1
        pid = decoders._processes._idle[0]._process.pid
        if Path("/proc").exists():
            (peak,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line]
            assert int(peak.split()[1]) < 120 * 2**10


def test_a_member_larger_than_its_header_justifies_is_not_unpacked(tmp_path: Path) -> None:
    image = encoded("PNG")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", image + bytes(40 * 2**20))
        archive.writestr("sound.png", image + bytes(2**20))
    bomb_member, sound = (entry.image for entry in members(tmp_path / "bomb.zip").entries)
    with Decoders(1) as decoders:
        with pytest.raises(RejectedImage, match="too large: 40 MiB for 40x30 pixels"):
            decoders.decode(bomb_member, FRAME)
        assert decoders.decode(sound, FRAME).width == 40


def test_damaged_archives_reject_their_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.png", encoded("PNG"))
        archive.writestr("two.png", encoded("PNG"))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    first, second = (entry.image for entry in members(tmp_path / "a.zip").entries)
    content[0:4] = b"XXXX"  # the header of the first
    content[second.offset + 60 + len("two.png")] ^= 1  # a byte of the second
    (tmp_path / "a.zip").write_bytes(content)
    for member in (first, second):
        with pytest.raises(RejectedImage, match="damaged"):
            decode(member, FRAME)
