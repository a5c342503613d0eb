"""diffkit's own samplers, by the names of their functions."""

from __future__ import annotations

from pkgutil import resolve_name
from types import SimpleNamespace

from diffkit import builtin

samplers = SimpleNamespace(**{target.split(":")[1]: resolve_name(target) for target in builtin.samplers().values()})
