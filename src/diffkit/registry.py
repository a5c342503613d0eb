"""Find a part by its name; keep a broken plugin from costing more than itself."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata as metadata
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pluggy

from diffkit import __version__, builtin, hookspecs
from diffkit.errors import DiffkitError, did_you_mean

KINDS = (
    "schedules",
    "predictions",
    "weightings",
    "samplers",
    "backbones",
    "tasks",
    "datasets",
    "extractors",
    "trackers",
)
GROUP = "diffkit"


@dataclass(frozen=True)
class Part:
    """One registered function: its kind and name, where it is, and which distribution brought it."""

    kind: str
    name: str
    target: Callable[..., Any] | str
    plugin: str
    distribution: str
    version: str

    @property
    def builtin(self) -> bool:
        return self.plugin == GROUP

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself; imports its module. Raises DiffkitError if that fails."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            with redirect_stdout(sys.stderr):
                return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except (Exception, SystemExit) as error:
            raise DiffkitError(
                f"{self.kind[:-1].capitalize()} '{self.name}' of {self.distribution} {self.version} cannot be "
                f"loaded: {_reason(error)}.",
                f"Is '{self.target}' right? Upgrade or remove it: pip install -U {self.distribution}.",
            ) from error

    @property
    def where(self) -> str:
        """`module:function`."""
        if isinstance(self.target, str):
            return self.target
        return f"{self.target.__module__}:{getattr(self.target, '__qualname__', '?')}"

    @property
    def summary(self) -> str:
        """The first line of the docstring, read from the source without importing it."""
        if not isinstance(self.target, str):
            return (inspect.getdoc(self.target) or "").split("\n")[0]
        module, _, attribute = self.target.partition(":")
        try:
            found = importlib.util.find_spec(module)
            source = found.loader.get_source(module) if found else ""  # type: ignore[union-attr]
            for node in ast.parse(source or "").body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == attribute:
                    return (ast.get_docstring(node) or "").split("\n")[0]
        except Exception:
            return ""
        return ""


@dataclass(frozen=True)
class Skipped:
    """A plugin that could not be loaded, and why."""

    plugin: str
    distribution: str
    version: str
    reason: str
    seconds: float = field(compare=False, default=0.0)

    def __str__(self) -> str:
        return (
            f"plugin '{self.plugin}' of {self.distribution} {self.version} was skipped "
            f"after {self.seconds:.1f} s: {self.reason}"
        )


class Registry:
    """All parts by kind and name. Third parties are loaded on the first name that is not built in."""

    def __init__(self, *, plugins: bool = True) -> None:
        self.skipped: list[Skipped] = []
        self._plugins_wanted = plugins
        self._loaded = False
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._parts: dict[str, list[Part]] = {kind: [] for kind in KINDS}
        self._register(builtin, GROUP, "diffkit", __version__)

    def find(self, kind: str, name: str) -> Part:
        """The part called `name`, or `plugin/name`. Raises DiffkitError with the nearest known name."""
        found = self.matching(kind, name)
        if not found and not self._loaded:
            self._load_third_parties()
            found = self.matching(kind, name)
        own = [part for part in found if part.builtin]
        if len(own or found) == 1:
            return (own or found)[0]
        if found:
            names = " or ".join(f"{part.plugin}/{part.name}" for part in found)
            raise DiffkitError(f"Two plugins bring a {word(kind)} called '{name}'.", f"Write {names}.")
        known = [part.name for part in self._parts[kind]]
        broken = "".join(f" ({skipped})" for skipped in self.skipped)
        raise DiffkitError(
            f"No {word(kind)} called '{name}'.{broken}",
            f"{did_you_mean(name, known)}See: diffkit plugins list {kind}.",
        )

    def parts(self, kind: str | None = None) -> list[Part]:
        """Every part, of one kind or of all, third parties' too."""
        self._load_third_parties()
        return [part for each in ([kind] if kind else KINDS) for part in self._parts[each]]

    def matching(self, kind: str, name: str) -> list[Part]:
        """The loaded parts of that name, bare or `plugin/name`."""
        plugin, slash, bare = name.rpartition("/")
        return [p for p in self._parts[kind] if p.name == bare and (not slash or p.plugin == plugin)]

    def _load_third_parties(self) -> None:
        if self._loaded or not self._plugins_wanted:
            return
        self._loaded = True
        seen: dict[str, str] = {}
        entries = metadata.entry_points(group=GROUP)
        for entry in sorted(entries, key=lambda e: (e.name, e.dist.name if e.dist else "")):
            distribution = entry.dist.name if entry.dist else "?"
            version = entry.dist.version if entry.dist else "?"
            start = time.perf_counter()
            try:
                if entry.name in seen:
                    if seen[entry.name] == distribution:
                        continue  # the same distribution, seen twice on the path
                    raise ImportError(f"its name is already that of a plugin of {seen[entry.name]}")
                seen[entry.name] = distribution
                with redirect_stdout(sys.stderr):  # what it prints must not get among our data
                    self._register(entry.load(), entry.name, distribution, version)
            except (Exception, SystemExit) as error:
                seconds = time.perf_counter() - start
                self.skipped.append(Skipped(entry.name, distribution, version, _reason(error), seconds))

    def _register(self, module: Any, plugin: str, distribution: str, version: str) -> None:
        self._manager.register(module, name=plugin)
        try:
            self._manager.check_pending()
            parts = [
                _checked(Part(kind, name, target, plugin, distribution, version))
                for kind in KINDS
                for hook in getattr(self._manager.hook, kind).get_hookimpls()
                if hook.plugin_name == plugin
                for name, target in hook.function().items()
            ]
        except BaseException:
            self._manager.unregister(name=plugin)
            raise
        for part in parts:
            self._parts[part.kind].append(part)


def _checked(part: Part) -> Part:
    if not isinstance(part.name, str) or not part.name or set(part.name) & set(":/,= "):
        raise ValueError(f"{part.name!r} is no name for a part: no empty names, no ':' '/' ',' '=' or spaces")
    if not callable(part.target) and not (isinstance(part.target, str) and ":" in part.target):
        raise TypeError(f"{part.kind} {part.name!r} is neither a function nor a string 'module:function'")
    return part


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def word(kind: str) -> str:
    """What users call a part of this kind."""
    return {"schedules": "scheduler", "datasets": "dataset source"}.get(kind, kind[:-1])


_registry: Registry | None = None


def registry() -> Registry:
    """The process's registry."""
    global _registry
    if _registry is None:
        _registry = Registry()
    return _registry


def loaded() -> list[Part]:
    """The parts whose code has been imported; none if nobody has asked for parts yet."""
    parts = [] if _registry is None else _registry.parts()
    return [part for part in parts if not isinstance(part.target, str) or part.target.split(":")[0] in sys.modules]


def disable_plugins() -> None:
    """Use built-in parts only (`--no-plugins`)."""
    global _registry
    _registry = Registry(plugins=False)
