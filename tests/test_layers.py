"""Who may import whom, and what must not be imported early."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffkit

ROOT = Path(diffkit.__file__).parent
ALLOWED = {
    "core": {"core", "interfaces"},
    "backbones": {"backbones", "interfaces", "names", "errors"},
    "datasets": {"datasets", "durable", "interfaces", "names", "paths", "errors"},
    "extractors": {"extractors", "durable", "errors"},
    "trackers": {"trackers", "interfaces", "errors"},
    "engine": {"engine", "core", "datasets", "durable", "checksum", "interfaces", "names", "paths", "errors"},
    "measure": {
        "measure",
        "records",
        "engine",
        "core",
        "datasets",
        "durable",
        "interfaces",
        "names",
        "paths",
        "errors",
    },
    "compose": {
        "compose",
        "records",
        "engine",
        "measure",
        "core",
        "registry",
        "config",
        "rundir",
        "durable",
        "interfaces",
        "names",
        "paths",
        "errors",
    },
    "registry.py": {"builtin", "hookspecs", "errors", "diffkit"},
    "config.py": {"names", "paths", "errors"},
    "rundir.py": {"config", "durable", "paths", "errors"},
    "records.py": {"durable"},
    "durable.py": {"names", "errors"},
    "names.py": set(),
    "paths.py": {"errors"},
    "checksum.py": set(),
    "errors.py": {"names"},
}
NO_TORCH = [
    "registry.py",
    "config.py",
    "rundir.py",
    "hookspecs.py",
    "interfaces.py",
    "builtin.py",
    "durable.py",
    "checksum.py",
    "cli",
]


def modules(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def checking_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {inner for block in blocks for inner in ast.walk(block)}


def imports(path: Path, *, inside_functions: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = checking_only(tree)
    nodes = ast.walk(tree) if inside_functions else ast.iter_child_nodes(tree)
    found: set[str] = set()
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            bare = node.module == "diffkit"
            found |= {f"diffkit.{alias.name}" if bare else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("place", ALLOWED)
def test_layers_import_downwards_only(place: str) -> None:
    for path in modules(place):
        for name in imports(path, inside_functions=True):
            if name.startswith("diffkit."):
                part = name.split(".")[1]
                assert part in ALLOWED[place] or part == "__version__", f"{path.name} imports {name}"


def reached(path: Path, seen: set[Path]) -> set[str]:
    """What importing this module imports, through diffkit's own modules too."""
    if path in seen:
        return set()
    seen.add(path)
    found = imports(path, inside_functions=False)
    for name in list(found):
        inner = ROOT.parent / Path(*name.split("."))
        for file in (inner.with_suffix(".py"), inner / "__init__.py"):
            if name.startswith("diffkit") and file.exists():
                found |= reached(file, seen)
    return found


@pytest.mark.parametrize("place", NO_TORCH)
def test_modules_that_only_name_things_do_not_import_torch(place: str) -> None:
    for path in modules(place):
        heavy = {name.split(".")[0] for name in reached(path, set())}
        assert not heavy & {"torch", "torchvision", "numpy", "PIL", "safetensors"}, path.name


def test_core_imports_torch_and_itself_only() -> None:
    """And, for kernels, Triton, which torch brings along where there is a GPU."""
    standard = set(sys.stdlib_module_names)
    for path in modules("core"):
        for name in imports(path, inside_functions=True):
            assert name.split(".")[0] in standard | {"torch", "triton", "diffkit"}, f"{path.name} imports {name}"


def test_rich_and_typer_live_in_the_command_line_only() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        if "cli" not in path.parts:
            heads = {name.split(".")[0] for name in imports(path, inside_functions=True)}
            assert not heads & {"rich", "typer"}, path.name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "list"], ["train", "--help"]])
def test_help_version_and_listing_never_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys, json
sys.argv = ["diffkit", *{arguments!r}]
from diffkit.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "torchvision", "numpy", "PIL"}}
print("\\n" + json.dumps(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_every_hook_is_documented_in_the_plugin_guide() -> None:
    guide = ROOT.parents[1] / "docs" / "plugins.md"
    tree = ast.parse((ROOT / "hookspecs.py").read_text())
    hooks = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(hooks) == 9
    assert [hook for hook in hooks if f"`{hook}`" not in guide.read_text()] == []
