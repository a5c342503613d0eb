"""The documentation: every command in it exists with the options it shows, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from diffkit.cli.commands import app
from diffkit.config import read_toml, validated

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKINGS = ("session", f"{ROOT.parent}/".lower(), "helper")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(diffkit [^`]+)`", text)
        found += [(page.name, line.split("#")[0].strip()) for line in lines if line.startswith("diffkit ")]
    return found


def options_of(words: list[str]) -> set[str]:
    command = get_command(app)
    while words and hasattr(command, "commands"):
        inner = command.commands.get(words[0])
        if inner is None:
            raise AssertionError(f"no command {words[0]}")
        command, words = inner, words[1:]
    return {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}


def test_there_are_commands_to_test() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_shown_exists_with_its_options(page: str, line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    while words and words[0].startswith("--"):
        assert words[0] in {"--debug", "--help", "--version", "--no-plugins"}
        words = words[1:]
    if not words or "|" in line:
        return
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= options_of(words) | {"--help", "-h"}, line


def test_settings_shown_exist() -> None:
    for page in PAGES:
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.M | re.S):
            if "[project]" not in block and "entry-points" not in block:
                from diffkit.config import tomllib

                validated(tomllib.loads(block), page.name)
    validated(read_toml(ROOT / "examples/recipe.toml"), "recipe.toml")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_of_the_readme_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names: dict[str, object] = {}
    exec(block.replace('"runs/mine"', repr(str(run))), names)
    assert names["images"].shape == (16, 12, 12, 3)  # type: ignore[attr-defined]


def test_the_parts_of_the_guide_keep_their_contracts() -> None:
    from diffkit.testing import check_extractor, check_task, check_tracker

    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "plugins.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        if "class Colours" in block or "def table" in block or "def edges" in block:
            exec(block, names)
    check_extractor(names["colours"], cells=3)
    check_tracker(names["table"])
    check_task(names["edges"])


def test_the_project_speaks_of_itself_alone() -> None:
    for page in PAGES:
        text = page.read_text().lower().replace("sessions.jsonl", "")
        assert not [word for word in WORKINGS if word in text], page.name
