"""Plugins, settings and surroundings that are not as they should be; and whatever is read, changed at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffkit.selftest import damage
from diffkit.selftest.actions import ACTIONS, TINY, content
from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab, Outcome
from diffkit.selftest.pictures import bounded, encoded, picture

BROKEN = {
    "cannot be imported": "import a_module_that_is_not_there",
    "is not Python": "def (",
    "ends the process": "import sys; sys.exit(3)",
    "raises": "raise ValueError('no')",
    "prints": "print('hello')",
    "is no plugin": "VALUE = 3",
}

WRONG = (
    "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--batch-size 0", "--batch-size -3", "--batch-size 1e9", "--steps 0",
    "--steps -1", "--epochs nan", "--epochs inf", "--time 3x", "--time -1s", "--size 0", "--size 12x",
    "--scheduler none",
    "--scheduler cosine:x=1", "--scheduler karras:rho=0", "--scheduler karras:rho=nan", "--prediction v:sigma_data=-1",
    "--backbone unet:width=0", "--backbone unet:width=-8", "--backbone unet:width=x", "--backbone unet:multipliers=[]",
    "--backbone unet:width=99999999999999999999", "--backbone unet:attention=[[[", "--preset enormous", "--set train=5",
    "--set train.lr", "--set train.lr=", "--set x.y=1", "--set train.lr=fast", "--set train.betas=[1]", "--set =",
    "--set train.clip=-1", "--set train.seed=-1", "--set data=1", "--set noise.s_min=0", "--set noise.s_max=-1",
    "--set noise.s_min=nan", "--set train.ema_half_life=-1", "--seed -1", "--seed 99999999999999999999999",
    "--micro-batch 0", "--device tpu", "--device cuda:99", "--precision float7", "--track nothing", "--best x",
    "--stop-when never", "--save-every x", "--preview-every -1", "--validate-every -1", "--ema-snapshots -1",
    "--gpus 0", "--gpus 99",
    "--gpus -1", "--init nothing", "--config nothing.toml", "--task none", "--factor 1",
    "--weighting none",
)  # fmt: skip


@row(28, "plugins that are broken")
def plugins(bench: Bench) -> Iterator[Trial]:
    return bench.each(with_plugin, [(kind,) for kind in BROKEN])


@row(29, "settings that are wrong")
def settings(bench: Bench) -> Iterator[Trial]:
    items = list(WRONG)
    random.Random(29).shuffle(items)
    return bench.each(refused, [(words,) for words in items])


@row(32, "no home, a full cache, closed outputs, odd terminals and encodings")
def surroundings(bench: Bench) -> Iterator[Trial]:
    return bench.each(
        surrounded, [(name, action) for name in SURROUNDINGS for action in ("prepare", "resume", "sample")]
    )


@row(33, "headers, tables, records, recipes and archives changed at random", full=2000)
def fuzzed(bench: Bench) -> Iterator[Trial]:
    return bench.each(mutated, ((kind, seed) for seed in range(100_000) for kind in FUZZED))


class Plugin:
    """Have a distribution with one entry point found, as if it had been installed."""

    def __init__(self, folder: Path, code: str) -> None:
        self.folder, self.code = folder, code

    def __call__(self) -> None:
        info = self.folder / "diffkit_broken-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diffkit-broken\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[diffkit]\nbroken = diffkit_broken\n")
        (self.folder / "diffkit_broken.py").write_text(self.code + "\n")
        sys.path.insert(0, str(self.folder))


def with_plugin(lab: Lab, kind: str) -> Trial:
    """A broken plugin costs itself only."""
    room = lab.room()
    listed = lab.diffkit("plugins", "list", here=room, setup=[Plugin(room / "one", BROKEN[kind])])
    problem = listed.unlike(0, *([] if kind in ("prints", "is no plugin") else ["diffkit-broken"]), "cosine")
    trained = lab.diffkit(*ACTIONS["train"].words(lab), here=room, setup=[Plugin(room / "two", BROKEN[kind])])
    problem = problem or trained.unlike(0)
    unknown = lab.diffkit("train", lab.data, "--scheduler", "x", here=room, setup=[Plugin(room / "six", BROKEN[kind])])
    problem = problem or unknown.unlike(2)
    Lab.clear(room)
    return Trial(f"a plugin that {kind}", problem)


def refused(lab: Lab, words: str) -> Trial:
    """A wrong setting ends the command before anything is written."""
    room = lab.room()
    outcome = lab.diffkit("train", lab.data, "-o", "run", "--steps", "1", *TINY, *words.split(), here=room)
    allowed = {2, 4} if "--device" in words or "--gpus" in words else {2, 7} if "--init" in words else {2}
    problem = outcome.unlike(allowed) or bounded(outcome)
    if not problem and (room / "run" / "config.toml").exists():
        problem = "a run was begun"
    Lab.clear(room)
    return Trial(f"train {words}", problem)


@dataclass(frozen=True)
class Surrounding:
    """The environment of a command, and descriptors that are closed or cannot be written to."""

    environment: dict[str, str | None]
    closed: tuple[int, ...] = ()
    full: tuple[int, ...] = ()

    def __call__(self) -> None:
        for descriptor in self.closed:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, descriptor)
        for descriptor in self.full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


SURROUNDINGS = {
    "no home": Surrounding({"HOME": None, "XDG_CACHE_HOME": None}),
    "a home that is not there": Surrounding({"HOME": "/nonexistent/home", "XDG_CACHE_HOME": None}),
    "a cache that cannot be written": Surrounding({"XDG_CACHE_HOME": "/proc/cache"}),
    "readers gone": Surrounding({}, closed=(1, 2)),
    "a full disk behind the outputs": Surrounding({}, full=(1, 2)),
    "TERM=dumb": Surrounding({"TERM": "dumb"}),
    "one column": Surrounding({"COLUMNS": "1", "LINES": "1"}),
    "colour forced": Surrounding({"FORCE_COLOR": "1", "NO_COLOR": None}),
    "ASCII": Surrounding({"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    "a time zone east": Surrounding({"TZ": "Pacific/Kiritimati"}),
    "no temporary folder": Surrounding({"TMPDIR": "/nonexistent"}),
}


def surrounded(lab: Lab, name: str, action: str) -> Trial:
    """A command's result does not depend on its surroundings."""
    if name == "a full disk behind the outputs" and not Path("/dev/full").exists():
        return Trial(f"{action}, {name} (not on this system)")
    where, room = SURROUNDINGS[name], ACTIONS[action].begin(lab)
    words = ACTIONS[action].words(lab)
    outcome = lab.diffkit(*words, here=room, setup=[where], environment=where.environment)
    problem = outcome.unlike(0)
    if not problem and content(lab.folder / "expected" / action) != content(room / ACTIONS[action].target):
        problem = "the result is another"
    Lab.clear(room)
    return Trial(f"{action}, {name}", problem)


def mutated(lab: Lab, kind: str, seed: int) -> Trial:
    """Something that a command reads is changed at random: it ends as documented, in bounded time and memory."""
    room, chance = lab.room(), random.Random(f"{kind} {seed}")
    outcome = FUZZED[kind](lab, room, chance)
    problem = outcome.bug or bounded(outcome)
    Lab.clear(room)
    return Trial(f"{kind}, seed {seed}", problem)


def _text(value: object, chance: random.Random) -> bytes:
    """JSON of a value, one thing in it changed; at times its bytes are changed instead."""
    if chance.random() < 0.25:
        return damage.mutated(json.dumps(value).encode(), chance)
    return json.dumps(damage.changed(value, chance)).encode()


def model_header(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """With the checksum made right again, or the change would be found out by that."""
    from diffkit.checksum import ZEROS, sealed

    data = (lab.run / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    metadata = head["__metadata__"]
    metadata["sha256"] = ZEROS.decode()
    if chance.random() < 0.7:
        metadata["diffkit"] = _text(json.loads(metadata["diffkit"]), chance).decode(errors="replace")
    else:
        head = damage.changed(head, chance)
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode(errors="backslashreplace")
    lead, content = struct.pack("<Q", len(text)) + text, data[8 + length :]
    file = room / "model.safetensors"
    file.write_bytes((sealed(lead, [memoryview(content)]) if ZEROS in lead else lead) + content)
    return lab.diffkit("sample", file, "-o", "out", "-n", "1", "--steps", "1", "--device", "cpu", here=room)


def data_index(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """dataset.json, with its checksum made right again."""
    from diffkit.checksum import ZEROS, sealed

    shutil.copytree(lab.data, room / "set")
    index = room / "set" / "dataset.json"
    value = damage.changed({**json.loads(index.read_text()), "sha256": ZEROS.decode()}, chance)
    text = (json.dumps(value, indent=2) + "\n").encode()
    index.write_bytes(sealed(text, []) if ZEROS in text else text)
    return lab.diffkit("train", "set", "-o", "run", "--steps", "1", *TINY, here=room)


def recipe(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """A recipe for train."""
    (room / "recipe.toml").write_bytes(_toml((lab.run / "config.toml").read_text(), chance))
    words = ("--config", "recipe.toml", "--steps", "1", "--device", "cpu", "--batch-size", "8")
    return lab.diffkit("train", lab.data, "-o", "run", *words, here=room)


def config(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """The settings of a run that goes on."""
    shutil.copytree(lab.run, room / "run")
    (room / "run" / "config.toml").write_bytes(_toml((lab.run / "config.toml").read_text(), chance))
    return lab.diffkit(*ACTIONS["resume"].words(lab), here=room)


def _toml(text: str, chance: random.Random) -> bytes:
    from diffkit.config import tomllib  # type: ignore[attr-defined]

    if chance.random() < 0.3:
        return damage.mutated(text.encode(), chance)
    import tomli_w

    value = damage.changed(tomllib.loads(text), chance)
    try:
        return tomli_w.dumps(value if isinstance(value, dict) else {"x": value}).encode(errors="backslashreplace")
    except TypeError:  # TOML has no null
        return damage.mutated(text.encode(), chance)


def records(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """The records of a run: metrics, starts, evaluations."""
    shutil.copytree(lab.run, room / "run")
    for name in ("metrics.jsonl", "sessions.jsonl"):
        file = room / "run" / name
        lines = file.read_bytes().splitlines()
        at = chance.randrange(len(lines))
        lines[at] = _text(json.loads(lines[at]), chance)
        file.write_bytes(b"\n".join(lines) + b"\n")
    if chance.random() < 0.5:
        return lab.diffkit("report", "run", "--no-trajectory", here=room)
    return lab.diffkit(*ACTIONS["resume"].words(lab), here=room)


def labels(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """A table of labels."""
    names = [path.relative_to(lab.images).as_posix() for path in sorted(lab.images.rglob("*.png"))]
    kind = chance.choice(("csv", "tsv", "jsonl"))
    comma = "\t" if kind == "tsv" else ","
    if kind == "jsonl":
        lines = [
            json.dumps({"file": name, "age": number, "kind": f"k{number % 3}"}) for number, name in enumerate(names)
        ]
    else:
        lines = [comma.join(("file", "age", "kind"))]
        lines += [comma.join((name, str(number), f"k{number % 3}")) for number, name in enumerate(names)]
    (room / f"labels.{kind}").write_bytes(damage.mutated("\n".join(lines).encode(), chance))
    words = ("prepare", lab.images, "-o", "set", "--size", "12", "--labels", f"labels.{kind}", "--class-column", "kind")
    return lab.diffkit(*words, here=room)


def archive(lab: Lab, room: Path, chance: random.Random) -> Outcome:
    """A zip of images."""
    with zipfile.ZipFile(room / "in.zip", "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as made:
        for number in range(4):
            made.writestr(f"{number}.png", encoded(picture(seed=number), "png"))
    (room / "in.zip").write_bytes(damage.mutated((room / "in.zip").read_bytes(), chance))
    return lab.diffkit("prepare", "in.zip", "-o", "set", "--size", "12", "--max-rejected", "100%", here=room)


FUZZED = {
    "header of a model": model_header,
    "dataset.json": data_index,
    "recipe": recipe,
    "config.toml": config,
    "records of a run": records,
    "table of labels": labels,
    "zip archive": archive,
}
