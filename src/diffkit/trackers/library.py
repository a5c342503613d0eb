"""A tracker's own library: an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffkit.errors import DiffkitError


@contextmanager
def required(extra: str) -> Iterator[None]:
    """Around imports of an optional library. Raises DiffkitError that says which extra of diffkit brings it."""
    try:
        yield
    except ImportError as error:
        raise DiffkitError(
            f"The tracker '{extra}' needs a library that is not installed: {error.name}.",
            f"Install it: pip install 'diffkit[{extra}]'.",
        ) from error
