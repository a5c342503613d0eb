"""What checksums cost: of a data set before training, against a pass through it; of a checkpoint, against its writing.

    python benchmarks/checksums.py DATA [--rounds 7]

Each round, in turns: the data set is verified; all of its images are read once as training reads them, and trained on
for some steps (a pass is as many as there are images); a checkpoint is written, synced and read back with checksums
over whole files, and again with checksums over its tensors only. Writes results/checksums.json.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import asked, only_steps, publish, spread, write

STEPS = 12


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def only_tensors(head: bytes, rest: Iterable[Any] = ()) -> bytes:
    """Instead of `sealed`: a digest over what follows the header, as a format without whole checksums would have."""
    digest = hashlib.sha256()
    for piece in rest:
        digest.update(piece)
    return head.replace(b"0" * 64, digest.hexdigest().encode(), 1)


def main() -> None:
    from diffkit.compose.start import prepare_training
    from diffkit.engine.checkpoint import save_checkpoint
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir

    options = asked(data=True, rounds=7)
    store = Store.open(options.data)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        training = prepare_training(
            {"data": {"path": str(options.data)}}, store, RunDir(Path(folder) / "run"), str(options.device)
        )
        training.begin()
        steps, batches, batch = only_steps(training.steps()), training.batches(), training.recipe.batch_size
        for _ in range(3):
            next(steps)
        state = training.state.checkpoint()

        def read() -> None:
            for first in range(0, store.count, batch):
                batches.batch(first, batch)

        def train() -> None:
            for _ in range(STEPS):
                next(steps)

        def save(name: str) -> None:
            save_checkpoint(Path(folder) / name, state)
            for each in (Path(folder) / name).iterdir():
                (each / "state.safetensors").unlink()
                each.rmdir()

        for _ in range(options.rounds):
            for name, action in (("verify", store.verify), ("read a pass", read), ("train", train)):
                found.setdefault(name, []).append(seconds(action))
            found.setdefault("checkpoint", []).append(seconds(lambda: save("whole")))
            with (
                patch("diffkit.engine.modelfile.sealed", only_tensors),
                patch("diffkit.engine.modelfile.is_intact", lambda head, start, rest: only_tensors(head, rest) != b""),
            ):
                found.setdefault("checkpoint, tensors only", []).append(seconds(lambda: save("tensors")))
        passes = [each * store.count / (STEPS * batch) for each in found.pop("train")]
    found["train a pass"] = passes
    shares = {
        "verify / train a pass": [a / b for a, b in zip(found["verify"], passes, strict=True)],
        "verify / read a pass": [a / b for a, b in zip(found["verify"], found["read a pass"], strict=True)],
        "checkpoint / tensors only": [
            a / b for a, b in zip(found["checkpoint"], found["checkpoint, tensors only"], strict=True)
        ],
    }
    size = sum((store.path / shard.file).stat().st_size for shard in store.shards)
    figures = {
        "data": {"images": store.count, "bytes": size},
        "checkpoint_bytes": state.nbytes,
        "seconds": {name: spread(values) for name, values in found.items()},
        "ratios": {name: spread(values) for name, values in shares.items()},
    }
    for name, value in {**figures["seconds"], **figures["ratios"]}.items():  # type: ignore[dict-item]
        print(f"{name}: {value}")
    write("checksums", figures)
    ratios = figures["ratios"]
    lines = [
        "| what | ratio: median (least to greatest) |",
        "|---|---|",
        *(f"| {name} | {r['median']:.4f} ({r['min']:.4f} to {r['max']:.4f}) |" for name, r in ratios.items()),
        "",
        f"{store.count:,} images of {store.spec.height}x{store.spec.width}, {size / 2**20:.0f} MiB; a checkpoint of",
        f"{state.nbytes / 2**20:.0f} MiB; {options.rounds} rounds, all of a round in turns",
        "([results](../benchmarks/results/checksums.json)).",
    ]
    publish("checksums", "reliability.md", "\n".join(lines))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
