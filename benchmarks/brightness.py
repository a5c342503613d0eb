"""Do models keep the brightness of their data? The mean of 1,000 samples against the mean of the data, per channel.

    python benchmarks/brightness.py DATA=RUN [DATA=RUN ...]

The goal is 2/255. The standard error says how far the mean of as many perfect samples would stray by chance.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import write

import diffkit
from diffkit.engine.store import Store

IMAGES = 1000


def measure(data: str, run: str) -> dict[str, Any]:
    store, model = Store.open(data), diffkit.load(run)
    made = model.sample(IMAGES, classes=list(model.spec.classes) or None)
    means = made.reshape(IMAGES, -1, model.spec.channels).astype(np.float64).mean(1)
    real, _ = store.gather(np.arange(min(store.count, 5000)))
    spread = real.reshape(len(real), -1, model.spec.channels).mean(1).std(0)
    wanted = (np.array(store.mean) + 1) * 127.5
    return {
        "run": Path(run).name,
        "size": f"{model.spec.height}x{model.spec.width}",
        "training_images": store.count,
        "images_seen": model.images_seen,
        "data": wanted.round(2).tolist(),
        "samples": means.mean(0).round(2).tolist(),
        "difference": (means.mean(0) - wanted).round(2).tolist(),
        "standard_error": (spread / IMAGES**0.5).round(2).tolist(),
    }


def main() -> None:
    rows = []
    for pair in sys.argv[1:]:
        data, _, run = pair.partition("=")
        rows.append(measure(data, run))
        print(rows[-1], flush=True)
    if rows:
        write("brightness", {"images": IMAGES, "rows": rows})


if __name__ == "__main__":
    main()
