"""`diffkit compare`: the table, the choice, the plot, and the defaults it leaves when asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import call_diffkit
from diffkit.config import read_toml
from diffkit.errors import ExitCode
from diffkit.measure.estimate import Estimate
from diffkit.measure.images import clipped, made
from diffkit.measure.tradeoff import Candidate, burnt, choice, front


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def candidate(calls: int, low: float, value: float, high: float) -> Candidate:
    return Candidate({"run": "r"}, calls, 1.0, 100, Estimate("KD", value, low, high))


def test_the_front_holds_what_no_other_beats_and_the_choice_is_the_cheapest_of_the_best() -> None:
    slow, best, cheap, poor, beaten = (
        candidate(100, 0.8, 1.0, 1.2),
        candidate(50, 0.7, 0.9, 1.1),
        candidate(20, 0.9, 1.05, 1.2),
        candidate(5, 4.0, 5.0, 6.0),
        candidate(20, 1.0, 1.3, 1.5),
    )
    assert front([slow, best, cheap, poor, beaten]) == [poor, cheap, best]
    assert choice([slow, best, cheap, poor, beaten]) == cheap  # 1.05 lies within the best one's interval
    assert choice([slow, best, poor]) == best


def test_burnt_images_are_never_the_choice_where_there_are_others() -> None:
    good, better = candidate(20, 0.9, 1.0, 1.1), replace(candidate(9, 0.4, 0.5, 0.6), burnt=True)
    assert choice([good, better]) == good
    assert choice([better]) == better
    assert burnt(0.4, 0.05) and not burnt(0.5, 0.4) and not burnt(0.04, 0.0)


def test_clipped_is_the_share_of_black_and_white() -> None:
    pixels = np.full((50, 4, 4, 1), 100, np.uint8)
    pixels[:, 0] = 0
    pixels[:, 1, :2] = 255
    assert clipped(made(pixels, None, "x")) == 6 / 16


def test_ways_of_sampling_are_compared_and_the_choice_becomes_the_default(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "defaults.toml").write_text("[sample]\nguidance = 1.0\nsteps = 9\n")
    options = ("--steps", 1, "--steps", 4, "--sampler", "euler", "--sampler", "heun", "-n", 24, "--device", "cpu")
    done = call_diffkit("compare", tmp_path / "run", *options, "--save", "--json", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == record
    found = [(each["sampler"], each["steps"], each["network_calls"]) for each in record["candidates"]]
    assert found == [("euler", 1, 1), ("euler", 4, 4), ("heun", 1, 1), ("heun", 4, 7)]
    assert all(
        each["metric"]["low"] < each["metric"]["value"] < each["metric"]["high"] for each in record["candidates"]
    )
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.width > 800
    (chosen,) = record["choice"]
    saved = read_toml(tmp_path / "run" / "defaults.toml")["sample"]
    assert (saved["steps"], saved["sampler"]["name"]) == (chosen["steps"], chosen["sampler"].split(":")[0])
    sampled = call_diffkit("sample", tmp_path / "run", "-o", tmp_path / "made", "-n", 2, "--json", "--device", "cpu")
    assert json.loads(sampled.stdout)["steps"] == chosen["steps"]


def test_the_table_names_what_differs_and_several_runs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    done = call_diffkit("compare", run, tmp_path / "other", "--steps", 2, "--sampler", "euler", "-n", 20)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "other") in done.stdout
    assert done.stdout.count("choice") == 2
    assert "Real against real" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "fid"], "Choose kid, frechet"),
        (["--sampler", "euller"], "Did you mean 'euler'?"),
        (["--guidance", "nan"], "A guidance of nan"),
        (["--data", "nowhere"], "There is no nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    run: Path, arguments: list[str], words: str
) -> None:
    done = call_diffkit("compare", run, *arguments, "-n", 20)
    assert done.returncode in (ExitCode.USAGE, ExitCode.DATA)
    assert words in " ".join(done.stderr.split())
