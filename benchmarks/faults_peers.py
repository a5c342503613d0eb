"""Other trainers through the rows of the scorecard that a training from outside can be put through.

    python benchmarks/faults_peers.py [--only NAME]

Each trial forks a process that has the libraries in memory, has it killed, its checkpoint cut or flipped, its images
damaged, and makes the same call again. Right is what docs/reliability.md promises of diffkit, and what diffkit is held
to in the same numbers of trials by the self-test. `bitwise`: of the trials that went on, those that ended with the bits
of an undisturbed training; it is not asked of the others for them to be right.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, environment, publish

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
sys.path.insert(0, str(Path(__file__).parent / "peers_faults"))

STEPS, IMAGES, DEADLINE = 8, 112, 120.0
TRIALS = {1: 40, 2: 20, 6: 24, 7: 100, 14: 3, 19: 24, 21: 5}
FILE = RESULTS / "faults-peers.json"
RIGHT = {"went on", "found out", "stopped"}
Verdict = tuple[str, bool]
"""What happened, and whether the result is bitwise that of an undisturbed training."""


class Peer:
    """A program, a folder to work in, and the result of an undisturbed training."""

    def __init__(self, name: str, folder: Path) -> None:
        from programs import newest_files, quietly

        self.name, self.folder, self.run, self.newest = name, folder, quietly, newest_files
        self.images = folder / "images"
        write_images(self.images, IMAGES)
        self.count = 0
        begun = time.monotonic()
        assert self.train(self.room()) == 0, "it fails without any fault"
        self.seconds = time.monotonic() - begun
        self.half = self.room()
        assert self.train(self.half, steps=STEPS - 3) == 0
        (self.half / "final.pt").unlink()
        again = self.room()
        assert self.train(again) == 0
        self.expected = weights(again)

    def room(self) -> Path:
        self.count += 1
        place = self.folder / f"{self.count}"
        place.mkdir()
        return place

    def resumed(self) -> Path:
        """A copy of a training that has been stopped."""
        place = self.room()
        shutil.copytree(self.half, place, dirs_exist_ok=True)
        return place

    def train(
        self,
        out: Path,
        *,
        steps: int = STEPS,
        images: Path | None = None,
        lr: float = 1e-4,
        setup: Callable[[], object] = lambda: None,
        kill_after: float | None = None,
    ) -> int:
        """The exit status; 1 for an exception, negative for a signal, 124 if it did not end in time."""

        def body() -> None:
            output = os.open(os.devnull, os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            setup()
            self.run(self.name, images or self.images, out, steps, lr=lr)

        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
            return 124
        return process.exitcode

    def again(self, out: Path, *, had: bool) -> Verdict:
        """The same call after a fault; `had`: there was a checkpoint before."""
        there = [*out.glob("checkpoint-*"), *out.glob("checkpoints/checkpoint_*"), *out.glob("model-*.pt")]
        if self.train(out):
            return "fails until someone removes the damaged checkpoint", False
        return ("began afresh" if had and not there else "went on"), same(weights(out), self.expected)


def weights(out: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = torch.load(out / "final.pt", weights_only=True)
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


class KillAt:
    """SIGKILL at the n-th time that a file is opened for writing, written by a library, renamed or removed."""

    def __init__(self, number: int, count: Path | None = None) -> None:
        self.left, self.file = number, count

    def __call__(self) -> None:
        import safetensors.torch
        import torch

        for module, name in (
            (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "remove"), (os, "unlink"), (os, "rmdir"),
            (torch, "save"), (safetensors.torch, "save_file"), (builtins, "open"),
        ):  # fmt: skip
            setattr(module, name, self.around(name, getattr(module, name)))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not set(str(options.get("mode", (*arguments, "r", "r")[1]))) & set("wax"):
                return function(*arguments, **options)
            self.tick()
            if name in ("save", "save_file"):  # a library writes by itself: it may be killed half-way
                result = function(*arguments, **options)
                path = next(each for each in arguments[1:] if isinstance(each, str | Path))
                if self.left == 1:
                    os.truncate(path, Path(path).stat().st_size // 2)
                self.tick()
                return result
            return function(*arguments, **options)

        return counted

    def tick(self) -> None:
        self.left -= 1
        if self.file is not None:
            with self.file.open("ab") as lines:
                lines.write(b"x")
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at_operations(peer: Peer) -> Iterator[Verdict]:
    """Row 1."""
    counter = peer.folder / "count"
    peer.train(peer.resumed(), setup=KillAt(10**9, counter))
    numbers = list(range(1, counter.stat().st_size + 1))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        out = peer.resumed()
        peer.train(out, setup=KillAt(number))
        yield peer.again(out, had=True)


def killed_at_random(peer: Peer) -> Iterator[Verdict]:
    """Row 2."""
    chance = random.Random(2)
    while True:
        out = peer.room()
        peer.train(out, kill_after=chance.random() * peer.seconds)
        yield peer.again(out, had=False)


def harmed(peer: Peer, harm: Callable[[Path, random.Random], object]) -> Iterator[Verdict]:
    chance = random.Random(6)
    while True:
        out = peer.resumed()
        files = peer.newest(peer.name, out)
        harm(chance.choices(files, [file.stat().st_size for file in files])[0], chance)
        code = peer.train(out)
        yield ("found out" if code else "used without a word"), False


def truncated(peer: Peer) -> Iterator[Verdict]:
    """Row 6."""
    return harmed(peer, lambda file, chance: os.truncate(file, chance.randrange(file.stat().st_size)))


def flipped(peer: Peer) -> Iterator[Verdict]:
    """Row 7."""
    from diffkit.selftest.damage import flip

    return harmed(peer, lambda file, chance: flip(file, chance.randrange(8 * file.stat().st_size)))


def diverging(peer: Peer) -> Iterator[Verdict]:
    """Row 14."""
    import torch

    for lr in (1e38, 1e30, 1e20):
        out = peer.room()
        code = peer.train(out, lr=lr)
        tensors = [] if code else [each for each in weights(out).values() if torch.is_tensor(each)]
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        yield ("stopped" if code else "finite" if finite else "saved weights that are not finite"), False


def damaged_image(peer: Peer) -> Iterator[Verdict]:
    """Row 19."""
    from diffkit.selftest import damage
    from diffkit.selftest.pictures import encoded, picture

    for seed in range(10_000):
        chance = random.Random(seed)
        images = peer.room()
        shutil.copytree(peer.images, images, dirs_exist_ok=True)
        suffix = ("png", "jpg")[seed % 2]
        file = images / f"damaged.{suffix}"
        file.write_bytes(damage.mutated(encoded(picture(), suffix), chance))
        if readable(file):
            continue
        code = peer.train(peer.room(), images=images)
        yield ("one damaged image ends the training" if code else "went on without it"), False


def readable(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return True


def modes(peer: Peer) -> Iterator[Verdict]:
    """Row 21: 16-bit gray, transparency of gray, colour and a palette, a photo turned by EXIF."""
    import numpy as np
    from PIL import Image, ImageOps
    from programs import SIZE, Folder

    from diffkit.selftest.pictures import picture

    ramp = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    alpha = Image.fromarray((ramp // 257).astype(np.uint8))
    colour = picture(SIZE)
    transparent, turned = colour.copy(), colour.copy()
    transparent.putalpha(alpha)
    gray = Image.merge("LA", [colour.convert("L"), alpha])
    palette = colour.quantize(8)
    exif = Image.Exif()
    exif[0x0112] = 3
    over = np.asarray(alpha)[..., None] / 255

    def on_white(image: Image.Image) -> Any:
        return np.asarray(image.convert("RGB")) * over + 255 * (1 - over)

    clear = np.asarray(palette.convert("RGB")).copy()
    clear[np.asarray(palette) == 1] = 255
    cases: list[tuple[Image.Image, dict[str, Any], Any]] = [
        (Image.fromarray(ramp), {}, (ramp / 257)[..., None].repeat(3, -1)),
        (gray, {}, on_white(colour.convert("L"))),
        (transparent, {}, on_white(colour)),
        (palette, {"transparency": 1}, clear),
        (turned, {"exif": exif}, np.asarray(ImageOps.flip(ImageOps.mirror(colour)))),
    ]
    for image, options, expected in cases:
        folder = peer.room()
        image.save(folder / "a.png", **options)
        if peer.name == "denoising-diffusion-pytorch":
            from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset

            read = Dataset(str(folder), SIZE, convert_image_to="RGB")[0] * 255
        else:
            read = (Folder(folder)[0] * 0.5 + 0.5) * 255
        off = abs(read.permute(1, 2, 0).numpy() - expected).max()
        yield ("as documented" if off < 2 else "altered without a word"), False


ROWS = {
    1: killed_at_operations, 2: killed_at_random, 6: truncated, 7: flipped, 14: diverging, 19: damaged_image, 21: modes,
}  # fmt: skip
RIGHT = {"went on", "found out", "stopped", "finite", "went on without it", "as documented"}


def of_peer(name: str) -> dict[str, Any]:
    for module in ("accelerate", "denoising_diffusion_pytorch", "diffusers.training_utils", "diffusers.optimization"):
        importlib.import_module(module)
    from diffusers import DDPMScheduler, UNet2DModel  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        peer, found = Peer(name, Path(folder)), {}
        for number, row in ROWS.items():
            if name == "accelerate" and number in (19, 21):  # it reads no images
                continue
            verdicts = [verdict for verdict, _ in zip(row(peer), range(TRIALS[number]), strict=False)]
            found[str(number)] = summary(verdicts, number in (1, 2))
            print(f"{name:28} {number:2} {found[str(number)]}", flush=True)
        return found


def summary(verdicts: list[Verdict], resumes: bool) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for what, _ in verdicts:
        counts[what] = counts.get(what, 0) + 1
    wrong = sum(count for what, count in counts.items() if what not in RIGHT)
    bitwise = {"bitwise": sum(exact for _, exact in verdicts)} if resumes else {}
    return {"trials": len(verdicts), "wrong": wrong, **bitwise, "what": counts}


def of_diffkit() -> dict[str, Any]:
    """As many trials of the self-test, which are right only if they are bitwise."""
    from diffkit.selftest import opened, run_row, scorecard

    found = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, opened(Path(folder), 2) as bench:
        for row in scorecard():
            if row.number in ROWS:
                result = run_row(row, bench, TRIALS[row.number], None)
                record = {"trials": result.trials, "wrong": len(result.wrong)}
                bitwise = {"bitwise": result.trials - len(result.wrong)} if row.number in (1, 2) else {}
                found[str(row.number)] = {**record, **bitwise, "what": result.wrong[:5]}
                print(f"{'diffkit':28} {row.number:2} {found[str(row.number)]}", flush=True)
    return found


def write_images(folder: Path, count: int) -> None:
    from diffkit.selftest.pictures import picture

    folder.mkdir()
    for index in range(count):
        picture(16, index).save(folder / f"{index:03}.png")


def main() -> None:
    from programs import PROGRAMS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PROGRAMS, "diffkit"])
    parser.add_argument("--table", action="store_true", help="write the table of docs/reliability.md, and run nothing")
    asked = parser.parse_args()
    if asked.table:
        publish("faults-peers", "reliability.md", table(json.loads(FILE.read_text())))
        return
    found = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
    for name in ["diffkit", *PROGRAMS] if asked.only is None else [asked.only]:
        found[name] = of_diffkit() if name == "diffkit" else of_peer(name)
        versions = {each: importlib.metadata.version(each) for each in PROGRAMS}
        record = {**environment(), "date": time.strftime("%F"), "versions": versions, "rows": found}
        FILE.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    publish("faults-peers", "reliability.md", table(record))


def table(record: dict[str, Any]) -> str:
    """In Markdown: for each row how many of the trials went wrong, and what was seen most often when they did."""
    rows, kept = record["rows"], json.loads((RESULTS / "faults.json").read_text())["rows"]
    own = rows.get("diffkit") or {
        number: {**row, "wrong": len(row["wrong"]), "what": {}} for number, row in kept.items()
    }
    peers = [name for name in record["versions"] if name in rows]
    lines = [f"| row | what is tried | diffkit | {' | '.join(peers)} |", "|---" * (3 + len(peers)) + "|"]
    for number in TRIALS:
        cells = [_cell(found.get(str(number))) for found in (own, *(rows[name] for name in peers))]
        lines.append(f"| {number} | {kept[str(number)]['title']} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([*lines, "", f"Wrong trials of all. {record['date']}, {versions}, torch {record['torch']}."])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    wrong = {what: count for what, count in dict(row["what"]).items() if count <= row["wrong"] and what not in RIGHT}
    most = f": {max(wrong, key=lambda what: wrong[what])}" if row["wrong"] and wrong else ""
    return f"{row['wrong']} of {row['trials']}{most}"


if __name__ == "__main__":
    main()
