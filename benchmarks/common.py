"""What every benchmark records beside its figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
INFO = Path("/proc/cpuinfo")


def only_steps(events: Iterable[Any]) -> Iterator[Any]:
    """A training's steps; what else it has to tell is printed."""
    from diffkit.engine.train import Progress

    for event in events:
        if isinstance(event, Progress):
            yield event
        else:
            print("  ", event, flush=True)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, device (a GPU if there is one, unless named) and load."""
    import torch

    import diffkit

    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "diffkit": diffkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


@contextmanager
def sources(before: str | None) -> Iterator[dict[str, Path]]:
    """Folders of code for PYTHONPATH: "now" that of this checkout, and "before" that of another commit, if one is
    named."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"now": ROOT / "src"}
        if before:
            archive = subprocess.run(
                ["git", "-C", str(ROOT), "archive", before, "src"], check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            found["before"] = Path(folder) / "src"
        yield found


def processor() -> str:
    """The CPU, and what it has for bfloat16."""
    from diffkit.engine.attention import has_amx

    model = re.search(r"model name\s*: (.*)", INFO.read_text()) if INFO.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, AMX" if has_amx() else name


def place(device: torch.device) -> str:
    """By what results are kept apart: the kind of device, of GPUs the model ("cuda-h100-80gb-hbm3")."""
    import torch

    if device.type != "cuda":
        return device.type
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cuda-{name.removeprefix('nvidia-')}"


def kind(device: torch.device) -> str:
    """As `place`; CPUs with AMX for bfloat16 are another kind than those without."""
    from diffkit.engine.attention import has_amx

    return "cpu-amx" if device.type == "cpu" and has_amx() else place(device)


def write(name: str, figures: dict[str, Any], device: torch.device | None = None) -> Path:
    """Keep the figures as `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(device), **figures}, indent=1) + "\n")
    print(f"written to {path}")
    return path


def kept(name: str) -> dict[str, Any]:
    """What `write` has kept; nothing if it never did."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def publish(mark: str, page: str, text: str) -> None:
    """Put generated lines into docs/PAGE, between `<!-- mark -->` and `<!-- end -->`."""
    path = DOCS / page
    begin, end = f"<!-- {mark} -->", "<!-- end -->"
    found, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", path.read_text(), flags=re.DOTALL)
    assert count == 1, f"{path} has no {begin}"
    path.write_text(found)


def show(name: str, device: torch.device, table: Callable[[dict[str, Any]], str], place: str) -> None:
    """Put the table of `results/NAME-PLACE.json` into docs/benchmarks.md; of GPUs, those of all that were measured."""
    if device.type != "cuda":
        publish(f"{name}-{place}.json", "benchmarks.md", table(kept(f"{name}-{place}")))
        return
    parts = []
    for path in sorted(RESULTS.glob(f"{name}-cuda-*.json")):
        found = json.loads(path.read_text())
        about = found["environment"]
        parts.append(f"{about['device']}, torch {about['torch']} ({path.name}):\n\n{table(found)}")
    publish(f"{name}-cuda.json", "benchmarks.md", "\n\n".join(parts))


def begun(name: str, device: torch.device, resume: bool) -> dict[str, Any]:
    """With `resume`, the figures of an earlier call of this benchmark, if it was of the same versions; else nothing."""
    found, now = kept(name), environment(device)
    same = resume and all(found.get("environment", {}).get(key) == now[key] for key in ("diffkit", "torch", "device"))
    found.pop("environment", None)
    return found if same else {}


def units(found: dict[str, Any], makers: Mapping[str, Callable[[], Any]], keep: Callable[[], object]) -> None:
    """Measure those units of a benchmark into `found` that it lacks, and `keep` what is there after each.

    So a benchmark that was cut off goes on, unit by unit.
    """
    for name, make in makers.items():
        if name in found:
            print(f"{name}: measured before", flush=True)
            continue
        found[name] = make()
        keep()


@contextmanager
def scratch(options: argparse.Namespace) -> Iterator[Path]:
    """A folder for images and sets that are made to be measured with: --scratch, which stays, or a temporary one."""
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
        yield options.scratch
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def asked(*, data: bool = False, large_batch: int = 64, **options: int | float) -> argparse.Namespace:
    """The command line: --device, --size and --batch, which follow from the device, and `options` by their defaults.

    `data`: a prepared set is to be named, which has a size of its own; the batch is then the device's. `large_batch`:
    that of a GPU; with 64 images of 128x128, 80 GB hold a training of every peer in float32.
    """
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(size=None, batch=None)
    if data:
        parser.add_argument("data", type=Path)
    else:
        parser.add_argument("--size", type=int)
        parser.add_argument("--batch", type=int)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--resume", action="store_true", help="leave what an earlier call has measured")
    parser.add_argument("--scratch", type=Path, help="a folder to keep what is made to be measured with")
    found = parser.parse_args()
    found.large = found.device.type == "cuda"
    found.size = found.size or (128 if found.large else 32)
    found.batch = found.batch or (large_batch if found.large else 32)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest of a few runs."""
    ordered = sorted(values)
    return {"min": round(ordered[0], 4), "median": round(ordered[len(ordered) // 2], 4), "max": round(ordered[-1], 4)}
