"""Records of another form are passed over and counted, whatever they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY, call_diffkit
from diffkit import durable, records
from diffkit.measure.report import read_records

NASTY = [
    None,
    True,
    -1,
    0.5,
    1e308,
    "x",
    [],
    {},
    [[1]],
    [None],
    10**30,
    float("nan"),
    float("inf"),
    "\u2028",
    "../../x",
]
FILES = {"metrics.jsonl": records.metrics, "sessions.jsonl": records.sessions, "evaluations.jsonl": records.evaluations}


@pytest.fixture(scope="module")
def told(dataset: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been validated, shown and evaluated, with every value of every record spoilt in turn."""
    folder = tmp_path_factory.mktemp("told") / "run"
    shutil.copytree(run, folder)
    (folder / "run.lock").unlink()
    options = ("--steps", 8, "--precision", "float32", "--validate-every", 8, "--preview-every", 8, *TINY)
    assert call_diffkit("train", dataset, "-o", folder, *options).returncode == 0
    done = call_diffkit("evaluate", folder, "-n", 20, "--steps", 1, "--data", dataset, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        lines = durable.read_lines(folder / name)
        kinds = {tuple(sorted(line)): line for line in lines}
        spoilt = [{**line, key: value} for line in kinds.values() for key in line for value in NASTY]
        spoilt += [{k: v for k, v in line.items() if k != key} for line in kinds.values() for key in line]
        if name == "evaluations.jsonl":
            spoilt += [{**line, "metrics": [{**line["metrics"][0], "value": v}]} for line in lines for v in NASTY]
        content = b"".join(map(durable.json_line, spoilt))
        (folder / name).write_bytes(
            (folder / name).read_bytes() + content + b"[1]\n5\nnull\n{\n" + b"[" * 99_999 + b"\n"
        )
    return folder


def test_every_accepted_record_can_be_shown(told: Path) -> None:
    done = call_diffkit("report", told)
    assert done.returncode == 0, done.stderr
    page = (told / "report.html").read_text()
    assert "which diffkit did not write so" in page
    found = read_records(told)
    assert found.passed_over > 300
    assert {each["images"] for each in found.validations} >= {48, 64}


@pytest.mark.parametrize(
    ("form", "good", "wrong"),
    [
        (records.Validation, {}, {"levels": [1.0, 2.0]}),
        (records.Validation, {"levels": [1.0], "more": 5}, {"training_loss": 0.0}),
        (records.Preview, {"picture": "samples/a.png"}, {"picture": "/etc/passwd"}),
        (records.Preview, {}, {"colour_mean": [0.1]}),
        (records.Step, {"loss": None, "non_finite": "the loss is nan"}, {"loss": "0.5"}),
        (records.Step, {"images": 2**62}, {"images": 2**64}),
        (records.Session, {}, {"command": "diffkit train"}),
    ],
)
def test_what_a_record_has_to_hold(form: type[records.Record], good: dict[str, Any], wrong: dict[str, Any]) -> None:
    whole: dict[type[records.Record], dict[str, Any]] = {
        records.Validation: {
            "images": 8,
            "holdout_loss": 1.0,
            "training_loss": 0.9,
            "levels": [1.0],
            "holdout_by_level": [1.0],
            "training_by_level": [0.9],
        },
        records.Preview: {"images": 8, "picture": "samples/images-8.png"},
        records.Step: {"images": 8, "loss": 0.5},
        records.Session: {},
    }
    form.model_validate(whole[form] | good)
    with pytest.raises(ValueError):
        form.model_validate(whole[form] | wrong)


def test_a_training_goes_on_whatever_its_records_hold(told: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(told, tmp_path / "run")
    (tmp_path / "run" / "run.lock").unlink()
    options = ("--steps", 9, "--precision", "float32", "--validate-every", 8, "--stop-when", "plateau", *TINY)
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", *options, "--preview-every", 0)
    assert done.returncode == 0, done.stderr
    done = call_diffkit("evaluate", tmp_path / "run", "-n", 20, "--steps", 1, "--data", dataset, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 20
