"""A folder of made images: PNG files, a record of each, and a sheet of the first hundred."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
    indices: Sequence[int],
    asked: Asked,
    target: Path,
    batch_size: int | None,
    how: dict[str, Any],
) -> int:
    """Write all files, each process its share, while the next batch is made; returns the network calls of an image."""
    import numpy as np
    from PIL import Image

    from diffkit import durable
    from diffkit.cli.console import progress
    from diffkit.engine.pictures import grid, png, save_png
    from diffkit.engine.publishing import Publisher
    from diffkit.names import file_names

    own = indices[model.world.share(len(indices))]
    folders = file_names([each for each in asked.classes if each is not None], taken=("samples.jsonl", "grid.png"))
    how = {**plan.names, "guidance": plan.guidance.scale, **how, "model": model.sha256}
    how |= {"strength": plan.strength} if asked.wishes.sources else {}

    def place(index: int) -> Path:
        label = asked.classes[index % len(asked.classes)]
        return Path(folders[label], f"{index:06d}.png") if label is not None else Path(f"{index:06d}.png")

    def record(index: int) -> dict[str, Any]:
        return {
            "file": place(index).as_posix(),
            "index": index,
            "seed": plan.seed,
            "class": asked.classes[index % len(asked.classes)],
            **({"attributes": asked.label} if asked.label else {}),
            **({"from": asked.given.names[index % len(asked.given)]} if asked.given else {}),
            "network_calls": calls,
            **how,
            "images_seen": model.images_seen,
        }

    calls, records = 0, target / "samples.jsonl"
    made: dict[Path, int] = {}

    def published(paths: Sequence[Path]) -> None:
        durable.append_lines(records, [record(made.pop(path)) for path in paths])

    used = {asked.classes[index % len(asked.classes)] for index in own}
    for folder in ["", *(folders[label] for label in used if label is not None)]:
        durable.make_folders(target / folder)
    with Publisher(published) as publisher, progress() as bar:
        task = bar.add_task("Sampling", total=len(own))
        for batch in model.generate(plan, own, asked.wishes, batch_size=batch_size, size=asked.size):
            calls = batch.calls
            files = {
                target / place(index): partial(png, pixels)
                for index, pixels in zip(batch.indices, batch.pixels, strict=True)
            }
            made.update(zip(files, batch.indices, strict=True))
            publisher.put(files)
            bar.update(task, advance=len(batch.indices))
    model.world.wait()
    if model.world.leads:
        lines = sorted(durable.read_lines(records), key=lambda line: int(line["index"]))
        durable.write_lines(records, lines)
        classes = len(asked.classes)
        columns = classes if 1 < classes <= min(10, len(indices)) else None
        shown = [np.asarray(Image.open(target / place(index))) for index in indices[:SHEET_IMAGES]]
        save_png(target / "grid.png", grid(np.stack(shown).reshape(len(shown), *shown[0].shape[:2], -1), columns))
    return calls
