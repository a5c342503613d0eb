"""Checks of trackers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from diffkit.interfaces import TrackedRun
from diffkit.testing.signature import check_signature, expectations


def check_tracker(function: Callable[..., AbstractContextManager[Any]], /, **options: Any) -> None:
    """A tracker `(run, *, options) -> context manager of log(images_seen, figures, pictures)`.

    It is told of figures, of a small picture, and of both, and closed; give `options` that keep it on this machine.
    """
    from PIL import Image

    expect = expectations(function)
    check_signature(expect, function, 1, options)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "samples.png"
        Image.new("RGB", (8, 8), "navy").save(picture)
        settings = {"train": {"lr": 0.001, "betas": [0.9, 0.99]}, "scheduler": {"name": "cosine"}}
        manager = function(TrackedRun(Path(folder), "check", settings, "0" * 16), **options)
        wanted = "a context manager (a generator under contextlib.contextmanager)"
        expect(isinstance(manager, AbstractContextManager), wanted, type(manager).__name__)
        with manager as log:
            expect(callable(log), "a function log(images_seen, figures, pictures)", type(log).__name__)
            log(64, {"train/loss": 0.5, "train/lr": 0.001}, {})
            log(128, {}, {"samples": picture})
            log(192, {"train/loss": 0.25}, {"samples": picture})
