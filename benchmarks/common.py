"""What every benchmark records beside its figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
INFO = Path("/proc/cpuinfo")


def only_steps(events: Iterable[Any]) -> Iterator[Any]:
    """A training's steps; what else it has to tell is printed."""
    from diffkit.engine.train import Progress

    for event in events:
        if isinstance(event, Progress):
            yield event
        else:
            print("  ", event, flush=True)


def environment() -> dict[str, Any]:
    """Versions, processor and load."""
    import torch

    import diffkit

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "diffkit": diffkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def processor() -> str:
    """The CPU, and what it has for bfloat16."""
    from diffkit.engine.attention import has_amx

    model = re.search(r"model name\s*: (.*)", INFO.read_text()) if INFO.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, AMX" if has_amx() else name


def kind(device: torch.device) -> str:
    """By what results are kept apart: CPUs with AMX for bfloat16 are another kind than those without."""
    from diffkit.engine.attention import has_amx

    return "cpu-amx" if device.type == "cpu" and has_amx() else device.type


def write(name: str, figures: dict[str, Any]) -> Path:
    """Keep the figures as `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **figures}, indent=1) + "\n")
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


def asked(*, data: bool = False, **options: int | float) -> argparse.Namespace:
    """The command line: --device, --size and --batch, which follow from the device, and `options` by their defaults.

    `data`: a prepared set is to be named, which has a size of its own; the batch is then the device's.
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
    found = parser.parse_args()
    found.large = found.device.type == "cuda"
    large_batch = 64 if data else 256
    found.size = found.size or (128 if found.large else 32)
    found.batch = found.batch or (large_batch if found.large else 32)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest of a few runs."""
    ordered = sorted(values)
    return {"min": round(ordered[0], 4), "median": round(ordered[len(ordered) // 2], 4), "max": round(ordered[-1], 4)}
