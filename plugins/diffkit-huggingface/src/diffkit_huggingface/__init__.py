"""Hugging Face data sets, local or from the hub, as a dataset source for diffkit."""

from __future__ import annotations

from diffkit import hookimpl

__version__ = "0.1.0"


@hookimpl
def datasets() -> dict[str, str]:
    """The name that users write, and where the function is."""
    return {"huggingface": "diffkit_huggingface.source:huggingface"}
