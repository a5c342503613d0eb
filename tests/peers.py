"""The published samplers, from the packages that people use: k-diffusion and diffusers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from functools import cache
from typing import Any

import pytest


@cache
def k_diffusion() -> Any:
    """k-diffusion's `sampling.py`, loaded by its path: what else the package imports is not needed for it."""
    try:
        files = importlib.metadata.files("k-diffusion") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("k-diffusion is not here: pip install --no-deps k-diffusion")
    (path,) = (file.locate() for file in files if str(file) == "k_diffusion/sampling.py")
    stand_ins = {"torchdiffeq": {"odeint": None}, "torchsde": {}, "k_peer": {}, "k_peer.utils": {}}
    added = [name for name in stand_ins if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(stand_ins[name])
    sys.modules["k_peer"].__path__ = []
    sys.modules["k_peer"].utils = sys.modules["k_peer.utils"]  # type: ignore[attr-defined]
    sys.modules["k_peer.utils"].append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    try:
        spec = importlib.util.spec_from_file_location("k_peer.sampling", str(path))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name in added:
            del sys.modules[name]
    return module
