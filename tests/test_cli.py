"""The command line: bad input gets a clear message and a documented exit code, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tape
from conftest import TINY, call_diffkit, run_diffkit, write_images
from diffkit.engine import gradients


def refused(done, code: int, *words: str) -> None:  # type: ignore[no-untyped-def]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    for word in words:
        assert word in text, text


def test_prepare_refuses_what_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("nothing")
    refused(call_diffkit("prepare", tmp_path / "fotos"), 3, "Did you mean", "photos")
    refused(call_diffkit("prepare", tmp_path / "photos", cwd=tmp_path), 3, "is empty")
    refused(call_diffkit("prepare", tmp_path / "notes", cwd=tmp_path), 3, "No image", ".txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "photos"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "0"), "is not an image size"),
        (("--size", "12x"), "is not an image size"),
        (("--size", "100000"), "The most is 8192x8192"),
        (("--workers", "-3"), "workers cannot be negative"),
        (("--crop", "centre"), "Did you mean 'center'"),
        (("--holdout", "lots"), "no share"),
        (("--background", "greenish"), "is not a colour"),
        (("--source", "foldr"), "Did you mean 'folder'"),
        (("--source", "folder:label=none"), "Did you mean 'labels'"),
        (("--color", "sepia"), "Choose color, gray or auto"),
    ],
)
def test_prepare_refuses_wrong_options(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    write_images(tmp_path / "images", {"a": 2, "b": 2})
    refused(call_diffkit("prepare", tmp_path / "images", "-o", tmp_path / "out", *options), 2, words)
    assert not (tmp_path / "out").exists()


def test_nothing_is_ever_overwritten(dataset: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("keep me")
    write_images(tmp_path / "images", {"a": 2, "b": 2})
    mine = tmp_path / "mine"
    refused(call_diffkit("prepare", tmp_path / "images", "-o", mine), 2, "-o")
    refused(call_diffkit("train", dataset, "-o", mine, "--steps", 1, *TINY), 2, "not a run", "-o")
    refused(call_diffkit("sample", run, "-o", mine), 2, "Nothing is overwritten")
    assert [path.name for path in mine.iterdir()] == ["diary.txt"]
    assert (mine / "diary.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheduler", "kerras"), "No scheduler called 'kerras'. Did you mean 'karras'"),
        (("--scheduler", "karras:roh=5"), "no option 'roh'. Did you mean 'rho'"),
        (("--scheduler", "karras:rho=many"), "does not fit"),
        (("--prediction", "epsilon"), "No prediction called 'epsilon'"),
        (("--backbone", "unet:width=wide"), "does not fit"),
        (("--preset", "huge"), "There are tiny, small, base, large"),
        (("--lr", "-1"), "greater than 0"),
        (("--set", "train.batchsize=3"), "Did you mean 'batch_size'"),
        (("--size", "64"), "Cannot crop 64x64"),
        (("--time", "soon"), "is not a duration"),
        (("--steps", "3", "--epochs", "2"), "Give one of them"),
        (("--config", "missing.toml"), "Cannot read"),
        (("--precision", "float16"), "train.precision"),
        (("--set", "sample.sampler='hern'"), "No sampler called 'hern'. Did you mean 'heun'"),
        (("--set", "train.betas=[2,3]"), "train.betas"),
        (("--set", "noise.s_max=inf"), "noise.s_max"),
        (("--epochs", "inf"), "must be above 0"),
        (("--scheduler", "karras:sigma_min=2000,sigma_max=9000"), "no noise level between"),
    ],
)
def test_train_refuses_wrong_options_and_creates_nothing(
    dataset: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    refused(call_diffkit("train", dataset, "-o", tmp_path / "run", "--device", "cpu", *options), 2, words)
    assert not (tmp_path / "run").exists()


def test_train_says_how_to_prepare_a_folder_of_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 2})
    refused(call_diffkit("train", tmp_path / "images"), 3, "diffkit prepare")
    refused(call_diffkit("train", tmp_path / "nowhere"), 3, "nowhere")


def test_an_absent_device_is_said_to_be_absent(dataset: Path, tmp_path: Path) -> None:
    refused(call_diffkit("train", dataset, "-o", tmp_path / "r", "--device", "cuda:17"), 4, "no device 'cuda:17'")
    refused(call_diffkit("train", dataset, "-o", tmp_path / "r", "--device", "gpu"), 2, "No device called 'gpu'")


def test_other_settings_do_not_resume_a_run(dataset: Path, run: Path) -> None:
    before = (run / "config.toml").read_bytes()
    refused(call_diffkit("train", dataset, "-o", run, "--lr", "0.5", "--steps", 12, "--device", "cpu"), 2, "train.lr")
    refused(
        call_diffkit("train", dataset, "-o", run, "--scheduler", "karras", "--steps", 12, "--device", "cpu"),
        2,
        "begun with scheduler.name",
    )
    assert (run / "config.toml").read_bytes() == before


def test_other_data_do_not_resume_a_run(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 8, "b": 8})
    made = call_diffkit("prepare", tmp_path / "images", "-o", tmp_path / "set", "--size", 12)
    assert made.returncode == 0, made.stderr
    refused(call_diffkit("train", tmp_path / "set", "-o", run, "--steps", 12, "--device", "cpu"), 3, "other data")


def test_a_finished_run_says_so(dataset: Path, run: Path) -> None:
    done = call_diffkit("train", dataset, "-o", run, "--steps", 6, "--device", "cpu")
    assert done.returncode == 0
    assert "already seen 48 images" in done.stderr


def test_a_run_in_use_is_locked(dataset: Path, run: Path) -> None:
    from diffkit.rundir import RunDir

    with RunDir(run).locked():
        done = run_diffkit("train", dataset, "-o", run, "--steps", 12, "--device", "cpu")
    refused(done, 5, f"process {os.getpid()}")


def test_sample_refuses_what_the_model_does_not_know(run: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out", "--device", "cpu")
    refused(call_diffkit("sample", run, "--class", "hihg", *out), 2, "No class 'hihg'. Did you mean 'high'", "low")
    refused(call_diffkit("sample", run, "--sampler", "dpmpp2m", *out), 2, "Did you mean 'dpmpp-2m'")
    refused(call_diffkit("sample", tmp_path / "nothing", *out), 7, "There is no")
    refused(call_diffkit("sample", tmp_path, *out), 7, "neither a run nor a model")
    assert not (tmp_path / "out").exists()


def test_show_tells_models_data_and_everything_else_apart(dataset: Path, run: Path, tmp_path: Path) -> None:
    data = call_diffkit("show", dataset, "--verify", "--json")
    assert json.loads(data.stdout)["classes"].keys() == {"high", "low"}
    model = call_diffkit("show", run, "--json")
    facts = json.loads(model.stdout)
    assert facts["images_seen"] == 48
    assert sum(stage["parameters"] for stage in facts["stages"]) > 1000
    table = call_diffkit("show", run)
    assert "bottleneck" in table.stdout and "GFLOPs" in table.stdout
    refused(call_diffkit("show", tmp_path), 7, "neither a run nor a model")


def test_plugins_list_show_and_check() -> None:
    listed = call_diffkit("plugins", "list", "schedulers", "--json")
    names = {part["name"] for part in json.loads(listed.stdout)["parts"] if part["plugin"] == "diffkit"}
    assert names == {"cosine", "linear", "sigmoid", "flow", "karras", "lognormal", "loglinear"}
    shown = call_diffkit("plugins", "show", "karras")
    assert "rho" in shown.stdout and "7.0" in shown.stdout and "Karras et al. 2022" in shown.stdout
    assert "passed" in call_diffkit("plugins", "check", "karras").stderr
    refused(call_diffkit("plugins", "show", "kerras"), 2, "Did you mean 'karras'")
    refused(call_diffkit("plugins", "list", "schedulars"), 2, "Did you mean 'schedulers'")


def test_init_starts_from_another_model_and_keeps_its_network(dataset: Path, run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    done = call_diffkit("train", dataset, "-o", new, "--init", run, "--steps", 1, "--batch-size", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "width = 8" in (new / "config.toml").read_text()
    refused(
        call_diffkit("train", dataset, "-o", tmp_path / "x", "--init", run, "--backbone", "unet", "--device", "cpu"),
        2,
        "--init takes the backbone",
    )
    refused(call_diffkit("train", dataset, "-o", tmp_path / "x", "--init", tmp_path, "--device", "cpu"), 7)


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "auto"),
        ("--micro-batch", "500"),
        ("--preset", "tiny", "--set", "backbone.dropout=0.1", "--set", "backbone.width=8"),
        ("--scheduler", "karras", "--set", "scheduler.rho=5"),
        ("--config", "RECIPE"),
        ("--init", "RUN"),
        ("--set", "sample.sampler='heun'", "--set", "noise.shift=2"),
    ],
)
def test_the_same_command_again_resumes(dataset: Path, run: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('preset = "tiny"\n[backbone]\nwidth = 8\nblocks = 1\n[sample]\nsteps = 3\n')
    words = [{"RECIPE": recipe, "RUN": run}.get(word, word) for word in options]
    if not {"--init", "--preset", "--config"} & set(options):
        words += TINY[:2]
    command = ("train", dataset, "--batch-size", 8, "--device", "cpu", *words)
    for steps in (1, 2):
        done = call_diffkit(*command, "--steps", steps, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "going on from 8 images" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["set"]


def test_part_options_from_recipe_flag_and_set_add_up(dataset: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[backbone]\nwidth = 8\nmultipliers = [1, 2]\n")
    options = ("--config", recipe, "--backbone", "unet:blocks=1", "--set", "backbone.attention=0", "--steps", 1)
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", *options, "--batch-size", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "width=8 multipliers=[1,2] blocks=1 attention=0" in done.stderr


def test_how_a_step_is_computed_may_change_on_the_way(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", dataset, "-o", tmp_path / "run", *TINY)
    monkeypatch.setattr(gradients, "graphs_on", lambda device: True)
    monkeypatch.setattr(gradients, "record", tape.record)
    done = call_diffkit(*command, "--steps", 9)
    assert done.returncode == 0 and "one CUDA graph" in done.stderr, done.stderr
    done = call_diffkit(*command, "--steps", 18, "--set", "train.cuda_graphs=false")
    assert done.returncode == 0 and "CUDA graph" not in done.stderr, done.stderr
    done = call_diffkit(*command, "--steps", 19, "--micro-batch", 3)
    assert done.returncode == 0, done.stderr
    assert "in pieces of 3" in done.stderr


def test_a_recipe_file_is_read_and_overridden(dataset: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'prediction = "v"\n[scheduler]\nname = "karras"\nrho = 5.0\n[backbone]\nwidth = 8\nmultipliers = [1, 2]\n'
        "blocks = 1\nattention = 0\n[train]\nbatch_size = 8\nlr = 1e-3\n"
    )
    command = ("train", dataset, "-o", tmp_path / "run", "--config", recipe, "--lr", "2e-3", "--steps", 1)
    done = call_diffkit(*command, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "rho = 5.0" in text and "lr = 0.002" in text and 'name = "v"' in text and 'name = "unet"' in text


def test_file_names_cannot_inject_markup(tmp_path: Path) -> None:
    done = call_diffkit("prepare", tmp_path / "[red]no[/red]\x1b[31m")
    assert done.returncode == 3
    assert "[red]no[/red]" in done.stderr
    assert "\x1b" not in done.stderr


def test_files_get_the_usual_permissions(run: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for file in (run / "model.safetensors", run / "config.toml"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_closed_pipe_ends_a_listing_quietly() -> None:
    command = f"{sys.executable} -m diffkit plugins list --json | sleep 0.01"
    script = f"{command}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0"]
    assert done.stderr == ""


def test_a_checkpoint_makes_images_only_within_its_run(run: Path, tmp_path: Path) -> None:
    state = next((run / "checkpoints").glob("images-*/state.safetensors"))
    for number, path in enumerate((state, state.parent)):
        done = call_diffkit("sample", path, "-o", tmp_path / str(number), "-n", 2, "--steps", 2, "--device", "cpu")
        assert done.returncode == 0, done.stderr
    apart = tmp_path / "a" / "b" / "c" / state.name
    apart.parent.mkdir(parents=True)
    apart.write_bytes(state.read_bytes())
    refused(call_diffkit("sample", apart, "-o", tmp_path / "no", "--device", "cpu"), 7, "without its run")
    refused(call_diffkit("show", state), 7, "part of a checkpoint")


def test_a_file_in_the_way_is_an_error_of_the_machine(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(call_diffkit("train", dataset, "-o", tmp_path / "file" / "run", *TINY, "--steps", 1), 4, "Not a directory")
