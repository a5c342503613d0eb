"""The registry: names, clashes, and plugins that break."""

from __future__ import annotations

import importlib.metadata as metadata
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffkit import hookimpl
from diffkit.errors import DiffkitError, ExitCode
from diffkit.registry import KINDS, Registry


@dataclass
class Distribution:
    name: str
    version: str = "1.2"


class Entry:
    """Stands for an installed entry point; loading it returns the module or raises."""

    def __init__(self, name: str, loaded: Any, distribution: str | None = None) -> None:
        self.name, self._loaded = name, loaded
        self.dist = Distribution(distribution or f"dist-{name}")

    def load(self) -> Any:
        if isinstance(self._loaded, BaseException):
            raise self._loaded
        return self._loaded


def plugin(**hooks: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType("plugin")
    for kind, parts in hooks.items():
        setattr(module, kind, hookimpl(partial_hook(kind, parts)))
    return module


def partial_hook(kind: str, parts: dict[str, Any]) -> Any:
    def hook() -> dict[str, Any]:
        return parts

    hook.__name__ = kind
    return hook


def shape(t: float) -> float:
    """A shape of ours."""
    return t


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*entries: Entry) -> Registry:
        monkeypatch.setattr(metadata, "entry_points", lambda group: list(entries))
        return Registry()

    return install


def test_every_built_in_part_can_be_found_and_imported() -> None:
    registry = Registry(plugins=False)
    parts = registry.parts()
    assert {part.kind for part in parts} == set(KINDS)
    for part in parts:
        assert callable(registry.find(part.kind, part.name).function)
        assert len(part.summary) > 10


def test_a_plugins_part_is_found_by_name(install: Any) -> None:
    registry = install(Entry("mine", plugin(schedules={"bend": shape})))
    part = registry.find("schedules", "bend")
    assert part.function is shape
    assert (part.distribution, part.version, part.builtin) == ("dist-mine", "1.2", False)
    assert registry.find("schedules", "mine/bend") is part


def test_plugins_are_not_loaded_for_a_built_in_name(install: Any) -> None:
    registry = install(Entry("bad", RuntimeError("must not be loaded")))
    assert registry.find("schedules", "cosine").builtin
    assert registry.skipped == []


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ImportError("no module named 'nothing'"), "ImportError: no module named"),
        (SyntaxError("bad line"), "SyntaxError"),
        (SystemExit(3), "SystemExit: 3"),
        (plugin(schedules={"a b": shape}), "no name for a part"),
        (plugin(schedules={"x": 7}), "neither a function nor"),
    ],
)
def test_a_broken_plugin_costs_only_itself(install: Any, failure: Any, words: str) -> None:
    registry = install(Entry("bad", failure), Entry("good", plugin(schedules={"bend": shape})))
    assert registry.find("schedules", "bend").function is shape
    (skipped,) = registry.skipped
    assert words in skipped.reason
    assert "dist-bad 1.2" in str(skipped)
    with pytest.raises(DiffkitError, match="dist-bad"):
        registry.find("schedules", "missing")


def test_what_a_plugin_prints_does_not_get_among_the_data(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talkative.py").write_text("print('imported')\ndef shape(t): return t\n")
    monkeypatch.syspath_prepend(tmp_path)

    def schedules() -> dict[str, str]:
        print("asked")
        return {"bend": "talkative:shape"}

    module = types.ModuleType("plugin")
    module.schedules = hookimpl(schedules)  # type: ignore[attr-defined]
    assert install(Entry("mine", module)).find("schedules", "bend").function(3) == 3
    out, err = capsys.readouterr()
    assert out == "" and {"asked", "imported"} <= set(err.split())


def test_a_hook_that_does_not_exist_is_refused(install: Any) -> None:
    registry = install(Entry("odd", plugin(schedulers={"bend": shape})))
    registry.parts()
    assert "schedulers" in registry.skipped[0].reason


def test_two_plugins_of_one_name_are_an_error_that_names_both(install: Any) -> None:
    entries = [Entry("one", plugin(schedules={"bend": shape})), Entry("two", plugin(schedules={"bend": shape}))]
    registry = install(*entries)
    with pytest.raises(DiffkitError, match="one/bend or two/bend"):
        registry.find("schedules", "bend")
    assert registry.find("schedules", "two/bend").plugin == "two"


def test_a_plugin_cannot_take_a_built_in_name(install: Any) -> None:
    registry = install(Entry("one", plugin(schedules={"cosine": shape})))
    registry.parts()
    assert registry.find("schedules", "cosine").builtin
    assert registry.find("schedules", "one/cosine").function is shape


def test_two_distributions_with_one_entry_point_name_are_reported(install: Any) -> None:
    first, second = plugin(schedules={"bend": shape}), plugin(schedules={"twist": shape})
    registry = install(Entry("same", first, "dist-a"), Entry("same", second, "dist-b"))
    assert registry.find("schedules", "bend").distribution == "dist-a"
    assert "already that of a plugin of dist-a" in registry.skipped[0].reason


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(DiffkitError, match=r"No scheduler called 'kerras'. Did you mean 'karras'") as caught:
        Registry(plugins=False).find("schedules", "kerras")
    assert caught.value.code == ExitCode.USAGE


def test_a_target_that_cannot_be_imported_names_its_distribution(install: Any) -> None:
    registry = install(Entry("late", plugin(schedules={"bend": "no_such_module:f"})))
    part = registry.find("schedules", "bend")
    with pytest.raises(DiffkitError, match=r"dist-late 1\.2 cannot be loaded"):
        _ = part.function


def test_no_plugins_means_none(install: Any) -> None:
    install(Entry("mine", plugin(schedules={"bend": shape})))
    with pytest.raises(DiffkitError):
        Registry(plugins=False).find("schedules", "bend")
