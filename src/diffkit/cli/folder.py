"""A folder of made images: PNG files, a record of each, and a sheet of the first hundred."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffkit.cli.asked import Asked
    from diffkit.compose import Model
    from diffkit.engine.sample import Plan

SHEET_IMAGES = 100


def make(
    model: Model,
    plan: Plan,
    indices: list[int],
    asked: Asked,
    target: Path,
    batch_size: int | None,
    how: dict[str, Any],
) -> int:
    """Write all files; returns the network calls that each image took."""
    import numpy as np

    from diffkit import durable
    from diffkit.cli.console import progress
    from diffkit.engine.pictures import grid, save_png

    shown: list[Any] = []
    calls = 0
    folders = _folders(asked.classes)
    how = {**plan.names, "guidance": plan.guidance.scale, **how, "model": model.sha256}
    how |= {"strength": plan.strength} if asked.wishes.sources else {}
    with durable.explained(target):
        target.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("Sampling", total=len(indices))
        for batch in model.generate(plan, indices, asked.wishes, batch_size=batch_size, size=asked.size):
            calls = batch.calls
            for index, pixels in zip(batch.indices, batch.pixels, strict=True):
                label = asked.classes[index % len(asked.classes)]
                path = Path(folders[label], f"{index:06d}.png") if label is not None else Path(f"{index:06d}.png")
                with durable.explained(target):
                    (target / path).parent.mkdir(exist_ok=True)
                save_png(target / path, pixels)
                durable.append_line(
                    target / "samples.jsonl",
                    {
                        "file": path.as_posix(),
                        "index": index,
                        "seed": plan.seed,
                        "class": label,
                        **({"attributes": asked.label} if asked.label else {}),
                        **({"from": asked.given.names[index % len(asked.given)]} if asked.given else {}),
                        "network_calls": calls,
                        **how,
                        "images_seen": model.images_seen,
                    },
                )
                if len(shown) < SHEET_IMAGES:
                    shown.append(pixels)
            bar.update(task, advance=len(batch.indices))
    classes = len(asked.classes)
    columns = classes if 1 < classes <= min(10, len(indices)) else None
    save_png(target / "grid.png", grid(np.stack(shown), columns))
    return calls


def _folders(names: Sequence[str | None]) -> dict[str, str]:
    """A folder name for each class: the class itself where it can be one."""
    result: dict[str, str] = {}
    for name in names:
        if name is None:
            continue
        safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).strip(". ") or "_"
        while safe in result.values() and name not in result:
            safe += "_"
        result.setdefault(name, safe)
    return result
