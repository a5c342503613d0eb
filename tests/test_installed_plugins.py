"""Real plugins, really installed: wheels built, put into a clean virtual environment with pip, trained and sampled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from conftest import write_images

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    ROOT,
    ROOT / "plugins/diffkit-laplace",
    ROOT / "plugins/diffkit-huggingface",
    ROOT / "examples/third_party_plugin",
]


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**environment, "COLUMNS": "200", "NO_COLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with diffkit and the three plugins as wheels.

    The large libraries are borrowed from the environment that runs the tests, by one .pth line; the packages under
    test are not: their wheels are what is imported.
    """
    folder = tmp_path_factory.mktemp("installed")
    wheels = folder / "wheels"
    for package in PACKAGES:
        build = call(
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, package, cwd=folder
        )
        assert build.returncode == 0, build.stderr
    made = call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "venv/bin/python"
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "diffkit" not in entry.name and entry.name not in {"pip", "setuptools"} and not entry.name.endswith(".pth"):
            (borrowed / entry.name).symlink_to(entry)
    (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    done = call(python, "-m", "pip", "install", "--no-deps", "--no-index", *sorted(wheels.glob("*.whl")), cwd=folder)
    assert done.returncode == 0, done.stderr
    where = call(python, "-c", "import diffkit; print(diffkit.__file__)", cwd=folder).stdout
    assert str(folder / "venv") in where
    return folder


@pytest.fixture(scope="module")
def data(environment: Path) -> Path:
    write_images(environment / "images", {"high": 12, "low": 12})
    done = call(
        environment / "venv/bin/diffkit",
        "prepare",
        "images",
        "-o",
        "set",
        "--size",
        12,
        "--holdout",
        0,
        cwd=environment,
    )
    assert done.returncode == 0, done.stderr
    return environment / "set"


@pytest.mark.slow
def test_installed_plugins_are_listed_and_pass_their_checks(environment: Path) -> None:
    diffkit = environment / "venv/bin/diffkit"
    listed = json.loads(call(diffkit, "plugins", "list", "--json", cwd=environment).stdout)
    assert listed["skipped"] == []
    third = {
        (part["kind"], part["name"], part["distribution"]) for part in listed["parts"] if part["plugin"] != "diffkit"
    }
    assert third == {
        ("schedules", "laplace", "diffkit-laplace"),
        ("schedules", "logistic", "diffkit-logistic"),
        ("datasets", "huggingface", "diffkit-huggingface"),
    }
    checked = call(diffkit, "plugins", "check", "laplace", "logistic", cwd=environment)
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr.count("passed") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "distribution"), [("laplace:b=0.7", "laplace"), ("logistic", "logistic")])
def test_a_plugins_schedule_trains_and_samples(
    environment: Path, data: Path, scheduler: str, distribution: str
) -> None:
    diffkit, run = environment / "venv/bin/diffkit", f"run-{distribution}"
    size = ("--backbone", "unet:width=8,multipliers=[1,2],blocks=1,attention=0", "--batch-size", 8, "--device", "cpu")
    done = call(diffkit, "train", data, "-o", run, "--scheduler", scheduler, "--steps", 4, *size, cwd=environment)
    assert done.returncode == 0, done.stderr
    assert f'distribution = "diffkit-{distribution}"' in (environment / run / "config.toml").read_text()
    grid = ("--scheduler", scheduler, "--steps", 4, "-n", 4, "--device", "cpu")
    made = call(diffkit, "sample", run, "-o", f"samples-{distribution}", *grid, cwd=environment)
    assert made.returncode == 0, made.stderr
    assert len(list((environment / f"samples-{distribution}").rglob("0*.png"))) == 4


@pytest.mark.slow
def test_a_run_goes_on_only_with_its_plugin_and_says_which(environment: Path, data: Path) -> None:
    """Without plugins the run cannot resume, but its model still samples: the training schedule is not needed."""
    diffkit = environment / "venv/bin/diffkit"
    size = ("--backbone", "unet:width=8,multipliers=[1,2],blocks=1,attention=0", "--batch-size", 8, "--device", "cpu")
    train = ("train", data, "-o", "run-gone", "--scheduler", "laplace", "--steps", 2)
    done = call(diffkit, *train, *size, cwd=environment)
    assert done.returncode == 0, done.stderr
    resumed = call(
        diffkit, "--no-plugins", "train", data, "-o", "run-gone", "--steps", 4, "--device", "cpu", cwd=environment
    )
    assert resumed.returncode == 7, resumed.stderr
    assert "pip install 'diffkit-laplace==" in resumed.stderr
    sampled = call(
        diffkit, "--no-plugins", "sample", "run-gone", "-n", 2, "--steps", 2, "--device", "cpu", cwd=environment
    )
    assert sampled.returncode == 0, sampled.stderr


@pytest.mark.slow
def test_the_hugging_face_source_prepares_a_folder_with_metadata(environment: Path) -> None:
    pytest.importorskip("datasets")
    folder = write_images(environment / "hf", {"train": 6})
    lines = [f"{index:03d}.png,{'ab'[index % 2]}" for index in range(6)]
    (folder / "train" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    diffkit = environment / "venv/bin/diffkit"
    command = ("prepare", folder, "--source", "huggingface", "-o", "hf-set", "--size", 12, "--holdout", 0, "--json")
    done = call(diffkit, *command, cwd=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == {"a": 3, "b": 3}
