"""Mutants of the code that everything durable passes through: changed on purpose, one place at a time.

    python benchmarks/mutants.py [--only durable.py] [--most N] [--coverage]

Every changed file is put in place of the real one in a copy of the sources, and the tests named in `TESTED` run against
it. A mutant that no test notices lives: it is listed, and the share that was killed is written to
benchmarks/results/mutants.json. The kinds of change are those of mutation testing: comparisons turned round, conditions
negated, `and` for `or`, numbers moved by one, statements left out, results withheld, exceptions let through.

Statements and branches that the same tests run are counted first; with --coverage that is all.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import RESULTS, environment

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "diffkit"
TESTED = {
    "checksum.py": ["test_integrity.py", "test_saver.py"],
    "durable.py": [
        "test_durable_order.py",
        "test_publishing.py",
        "test_durable_errors.py",
        "test_durable.py",
        "test_selftest.py",
        "test_rundir.py",
    ],
    "engine/checkpoint.py": ["test_durable_errors.py", "test_saver.py", "test_integrity.py"],
    "engine/modelfile.py": ["test_modelfile.py", "test_integrity.py", "test_durable_errors.py", "test_saver.py"],
}
TURNED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
DEADLINE = 240


class Mutator(ast.NodeTransformer):
    """Makes the n-th of the changes that can be made, counted from 0."""

    def __init__(self, number: int) -> None:
        self.left, self.what = number, ""

    def due(self, node: ast.AST, what: str) -> bool:
        self.left -= 1
        if self.left == -1:
            self.what = f"{getattr(node, 'lineno', 0)}: {what}"
        return self.left == -1

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            node.body = [each for statement in node.body for each in [self.visit(statement)]]
            return node
        if isinstance(node, ast.AnnAssign | ast.Import | ast.ImportFrom) or is_text(node):
            return node
        self.generic_visit(node)
        return self.changed(node)

    def changed(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED and self.due(node, "comparison turned"):
            node.ops[0] = TURNED[type(node.ops[0])]()
        elif isinstance(node, ast.BoolOp) and self.due(node, "and for or, or for and"):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and self.due(node, "not left out"):
            return node.operand
        elif isinstance(node, ast.Constant) and type(node.value) is int and self.due(node, "number + 1"):
            node.value += 1
        elif isinstance(node, ast.Constant) and type(node.value) is bool and self.due(node, "boolean turned"):
            node.value = not node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and self.due(node, "+ for -"):
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        elif isinstance(node, ast.IfExp | ast.If) and self.due(node, "condition negated"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Return) and not is_false(node.value) and self.due(node, "None returned"):
            node.value = ast.Constant(None)
        elif isinstance(node, ast.Expr | ast.Raise | ast.AugAssign) and self.due(node, "statement left out"):
            return ast.copy_location(ast.Pass(), node)
        return node


def is_false(value: ast.expr | None) -> bool:
    """Whether None would do as well: nothing is returned, or the constant False."""
    return value is None or (isinstance(value, ast.Constant) and value.value is False)


def is_text(node: ast.AST) -> bool:
    """A docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mutants(file: Path) -> Iterator[tuple[str, str]]:
    """What was changed, and the changed source."""
    tree = ast.parse(file.read_text())
    number = 0
    while True:
        mutator = Mutator(number)
        changed = ast.fix_missing_locations(mutator.visit(copy.deepcopy(tree)))
        if not mutator.what:
            return
        yield mutator.what, ast.unparse(changed)
        number += 1


def killed(name: str, source: str) -> bool:
    """Whether a test notices; one that does not end notices too. The tests run in a process forked from this one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copytree(SOURCES, Path(folder) / "diffkit", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "diffkit" / name).write_text(source)
        process = get_context("fork").Process(target=tested, args=(Path(folder), TESTED[name]))
        process.start()
        process.join(DEADLINE)
        if process.exitcode is None:
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        return process.exitcode != 0


def tested(folder: Path, tests: list[str]) -> None:
    """Run tests against the sources in `folder`; ends the process."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    paths = [str(folder), *(str(path) for path in (ROOT / "plugins").glob("*/src"))]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:0] = paths
    os.chdir(ROOT)
    import pytest

    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(folder / "tmp")]
    sys.exit(pytest.main([*words, *(f"tests/{test}" for test in tests)]))


def covered() -> dict[str, dict[str, int]]:
    """Statements and branches of each file, and how many of both its tests do not reach."""
    with tempfile.TemporaryDirectory() as folder:
        data, report = f"{folder}/data", f"{folder}/report.json"
        own = ["--branch", f"--data-file={data}", f"--include={','.join(f'*/diffkit/{name}' for name in TESTED)}"]
        tests = sorted({f"tests/{test}" for each in TESTED.values() for test in each})
        coverage = [sys.executable, "-m", "coverage"]
        subprocess.run([*coverage, "run", *own, "-m", "pytest", "-q", "-p", "no:xdist", *tests], cwd=ROOT, check=True)
        subprocess.run([*coverage, "json", "-q", f"--data-file={data}", "-o", report], cwd=ROOT, check=True)
        files = json.loads(Path(report).read_text())["files"]
    totals = {
        name: next(files[path]["summary"] for path in files if path.endswith(f"diffkit/{name}")) for name in TESTED
    }
    return {
        name: {
            "statements": total["num_statements"],
            "branches": total["num_branches"],
            "missed": total["missing_lines"] + total["missing_branches"],
        }
        for name, total in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TESTED)
    parser.add_argument("--coverage", action="store_true", help="count statements and branches only")
    parser.add_argument("--most", type=int, help="of each file, evenly spread")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    place, found = RESULTS / "mutants.json", dict[str, Any]()
    if not (asked.only or asked.most):
        kept = {**json.loads(place.read_text()), "coverage": covered()}
        print(json.dumps(kept["coverage"], indent=1), flush=True)
        place.write_text(json.dumps(kept, indent=2) + "\n")
    if asked.coverage:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "numpy", "PIL.Image", "pydantic", "safetensors", "pytest"])
    pool = ProcessPoolExecutor(asked.workers, context)
    for name in [asked.only] if asked.only else TESTED:
        made = list(mutants(SOURCES / name))
        chosen = made[:: max(1, len(made) // asked.most)] if asked.most else made
        assert not pool.submit(killed, name, (SOURCES / name).read_text()).result(), f"{name}: the tests fail anyway"
        verdicts = list(pool.map(killed, [name] * len(chosen), [source for _, source in chosen]))
        living = [what for (what, _), dead in zip(chosen, verdicts, strict=True) if not dead]
        found[name] = {"mutants": len(chosen), "killed": len(chosen) - len(living), "living": living}
        print(f"{name}: {found[name]['killed']} of {len(chosen)} killed", *living, sep="\n  ", flush=True)
    if not (asked.only or asked.most):
        place.write_text(json.dumps({**kept, **environment(), "files": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
