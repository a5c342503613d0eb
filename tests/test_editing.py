"""Editing with a model as it is: from the command line, on a small model trained here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

import diffkit
from conftest import TINY, call_diffkit, run_diffkit, write_images
from diffkit.core.brownian import Path as BrownianPath
from diffkit.core.editing import adds_noise, between, kept, resampled
from diffkit.core.schedules import loglinear, over_range, sampling_grid
from diffkit.durable import read_lines
from diffkit.engine.pictures import psnr
from diffkit.engine.tiles import tiled
from diffkit.errors import DiffkitError, ExitCode
from parts import samplers


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("photo"), {"x": 1})
    return folder / "x" / "000.png"


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.zeros((12, 12), np.uint8)
    pixels[:, 6:] = 255
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    Image.fromarray(pixels).save(path)
    return path


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("more", [(), ("--resample", 3), ("--sampler", "ancestral"), ("--sampler", "adaptive")])
def test_known_pixels_stay_exactly_and_the_others_are_made(
    run: Path, photo: Path, masked: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    options = ("--from", photo, "--mask", masked, "-n", 3, "--steps", 5, "--device", "cpu", *more)
    done = call_diffkit("sample", run, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    source, made = opened(photo), [opened(tmp_path / "out" / f"{n:06d}.png") for n in range(3)]
    for each in made:
        assert np.array_equal(each[:, :6], source[:, :6])
    assert np.abs(made[0][:, 6:] - made[1][:, 6:]).mean() > 3


def test_strength_says_how_much_of_an_image_is_made_anew(run: Path, photo: Path, tmp_path: Path) -> None:
    away = []
    for strength in (0.1, 0.5, 0.95):
        out = tmp_path / str(strength)
        done = call_diffkit(
            "sample", run, "-o", out, "--from", photo, "-n", 4, "--strength", strength, "--device", "cpu"
        )
        assert done.returncode == 0, done.stderr
        away.append(np.mean([np.abs(opened(out / f"{n:06d}.png") - opened(photo)).mean() for n in range(4)]))
        (record, *_) = read_lines(out / "samples.jsonl")
        assert (record["from"], record["strength"]) == ("000.png", strength)
    assert away == sorted(away) and away[0] < away[2] / 4


def test_an_image_inverted_and_made_again_is_the_same(run: Path, photo: Path, tmp_path: Path) -> None:
    done = call_diffkit("invert", run, photo, "-o", tmp_path / "out", "--sampler", "euler", "--steps", 100)
    assert done.returncode == 0, done.stderr
    assert psnr(opened(photo), opened(tmp_path / "out" / "000000.png")) > 30  # type: ignore[arg-type]
    noise = np.load(tmp_path / "out" / "noise.npy")
    assert noise.shape == (1, 3, 12, 12)
    # The same noise, sampled by the other command.
    options = ("--noise", tmp_path / "out" / "noise.npy", "--sampler", "euler", "--steps", 100)
    again = call_diffkit("sample", run, "-o", tmp_path / "again", *options)
    assert again.returncode == 0, again.stderr
    assert np.abs(opened(tmp_path / "again" / "000000.png") - opened(tmp_path / "out" / "000000.png")).max() <= 1


def test_films_between_seeds_and_of_the_way_from_noise(run: Path, photo: Path, tmp_path: Path) -> None:
    options = ("--frames", 3, "--steps", 4, "--class", "high", "--class", "low")
    done = call_diffkit("interpolate", run, "-o", tmp_path / "a.gif", "--seeds", "0,1", "--loop", *options)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames, film.size) == (6, (132, 132))  # type: ignore[attr-defined]
    done = call_diffkit("interpolate", run, "-o", tmp_path / "frames", "--seeds", "3,4", *options)
    assert done.returncode == 0, done.stderr
    first = opened(tmp_path / "frames" / "0000.png")
    one = diffkit.load(run, device="cpu").sample(1, seed=3, steps=4, classes=["high"])
    assert np.abs(first - one[0].astype(int)).max() <= 1
    done = call_diffkit("interpolate", run, "-o", tmp_path / "own", "--from", photo, "--from", photo, "--frames", 1)
    assert done.returncode == 0, done.stderr
    assert psnr(opened(photo), opened(tmp_path / "own" / "0001.png")) > 25  # type: ignore[arg-type]
    for name in ("t.gif", "t.png", "t"):
        done = call_diffkit("trajectory", run, "-o", tmp_path / name, "-n", 2, "--steps", 4)
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "t.gif") as film:
        lasting = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
    assert sum(lasting) == pytest.approx(
        4 * 125 + 2000, abs=40
    )  # equal frames may have become one; GIF has 10 ms steps
    assert len(list((tmp_path / "t").iterdir())) == 4


def test_an_mp4_film_is_one(run: Path, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    done = call_diffkit("trajectory", run, "-o", tmp_path / "t.mp4", "-n", 1, "--steps", 6, "--fps", 6)
    assert done.returncode == 0, done.stderr
    frames, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "t.mp4"))
    assert (frames, round(seconds)) == (6 + 12, 3)


def test_larger_images_are_made_in_tiles(run: Path, tmp_path: Path) -> None:
    done = call_diffkit(
        "sample", run, "-o", tmp_path / "out", "--size", "20x30", "-n", 2, "--steps", 3, "--class", "low"
    )
    assert done.returncode == 0, done.stderr
    assert opened(tmp_path / "out" / "low" / "000000.png").shape == (20, 30, 3)
    assert "3 steps = 36 network calls" in done.stderr  # 3 x 4 tiles


def test_one_tile_is_the_plain_denoiser_and_many_agree_where_they_must() -> None:
    def denoise(x: Tensor, s: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x.shape[-2:] == (8, 8) and condition["image"].shape[-2:] == (8, 8)
        return 0.5 * x + condition["image"]

    x, image = torch.randn(2, 3, 20, 13), torch.randn(2, 1, 20, 13)
    found = tiled(denoise, {"image": image, "label": torch.ones(2, 4)}, (8, 8))(x, 1.0)
    torch.testing.assert_close(found, 0.5 * x + image)


def test_resampling_keeps_the_law_of_the_samples() -> None:
    """Two steps forth, back up with fresh noise, forth again: on Gaussian data still the right variance."""
    sd, grid = 0.5, sampling_grid(over_range(loglinear, 0.01, 50.0), 200)
    generator = torch.Generator().manual_seed(0)

    def noise(s: float, s_next: float) -> Tensor:
        return torch.randn(1, 1, 1, 40_000, generator=generator)

    def denoise(x: Tensor, s: float | Tensor) -> Tensor:
        return sd**2 / (sd**2 + s**2) * x

    *_, found = resampled(samplers.heun, 3)(denoise, noise(0, 0) * 50, grid, noise)
    assert float(found.std()) == pytest.approx(sd, rel=0.03)


def test_what_is_kept_is_where_every_sampler_ends() -> None:
    source, mask = torch.full((1, 1, 2, 2), 0.3), torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    denoise = kept(lambda x, s: torch.zeros_like(x), source, mask)
    grid = sampling_grid(over_range(loglinear, 0.01, 50.0), 10)
    draw = BrownianPath(lambda numbers: [torch.randn(1, 1, 2, 2) for _ in numbers], grid)
    for sampler in (samplers.euler, samplers.heun, samplers.unipc, samplers.dpmpp_2m_sde):
        *_, found = sampler(denoise, 50 * torch.randn(1, 1, 2, 2), grid, draw.noise)
        torch.testing.assert_close(found, source * (1 - mask), atol=1e-5, rtol=0)


def test_which_samplers_add_noise_is_found_by_trying() -> None:
    noisy = [name for name, sampler in vars(samplers).items() if adds_noise(sampler)]
    assert sorted(noisy) == ["ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "edm_stochastic"]


def test_between_two_noises_the_strength_stays() -> None:
    one, other = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(between(one, other, 0.0), one)
    torch.testing.assert_close(between(one, other, 1.0), other)
    assert float(between(one, other, 0.5).std()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(between(one, one, 0.3), one)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strength", 0.5), "--strength says how much of an image"),
        (("--from", "PHOTO", "--strength", 0), "A strength of 0.0 is none"),
        (("--from", "PHOTO", "--strength", 1.5), "A strength of 1.5 is none"),
        (("--from", "nowhere.png"), "There is no nowhere.png"),
        (("--mask", "MASK"), "--mask says which part of an image"),
        (("--from", "PHOTO", "--mask", "SMALL"), "The mask small.png is 6x6 .*its image 000.png 12x12"),
        (("--from", "PHOTO", "--mask", "BLACK"), "The mask black.png is all black"),
        (("--from", "WIDE"), "wide.png is 24x12 .*of another shape.*--crop center or --crop pad"),
        (("--from", "PHOTO", "--crop", "middle"), "--crop cannot be 'middle'"),
        (("--from", "BROKEN"), "broken.png cannot be used"),
        (("--input", "PHOTO"), "This model makes images from noise.*--from FILE"),
        (("--size", "8x8"), "--size 8x8 is smaller than the 12x12"),
        (("--noise", "PHOTO"), "is damaged or not a NumPy array"),
        (("--steps", 0), "--steps"),
        (("--steps", -3), "--steps"),
        (("--set-label", "age=3"), "This model knows no attributes"),
        (("--set-label", "age"), "gives no number"),
        (("--class", "high=0.5", "--class", "low"), "Some classes have a share and some have none"),
        (("--class", "high=-1", "--class", "low=2"), "Shares of classes are positive"),
        (("--class", "hihg=1"), "No class 'hihg'.*Did you mean 'high'"),
        (("--guidance-interval", "5,1", "--guidance", 2), "Guidance between 5 and 1 is none"),
        (("--guidance-interval", "5", "--guidance", 2), "is not two numbers"),
        (("--guidance-rescale", 0.5), "Nothing is guided here"),
        (("--guidance-rescale", 2, "--guidance", 2), "guidance-rescale = 2 is no share"),
        (("--threshold", 0.1), "threshold = 0.1 is no share"),
        (("--guide", "nowhere"), "There is no nowhere"),
        (("--resample", 0, "--from", "PHOTO", "--mask", "MASK"), "0 passes make no image"),
        (("--sampler", "unipc:order=7"), "should be 1, 2 or 3"),
        (("--sampler", "unipcc"), "Did you mean 'unipc'"),
    ],
)
def test_what_makes_no_image_is_said(
    run: Path, photo: Path, masked: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    places = {"PHOTO": photo, "MASK": masked}
    for name, size in (("SMALL", (6, 6)), ("BLACK", (12, 12)), ("WIDE", (24, 12))):
        places[name] = tmp_path / f"{name.lower()}.png"
        Image.new("L", size, 0 if name == "BLACK" else 255).save(places[name])
    places["BROKEN"] = tmp_path / "broken.png"
    places["BROKEN"].write_bytes(photo.read_bytes()[:60])
    given = [places.get(str(each), each) for each in arguments]
    done = call_diffkit("sample", run, "-o", tmp_path / "out", "-n", 1, "--device", "cpu", *given)
    assert done.returncode not in (0, ExitCode.BUG), done.stderr
    assert re.search(words, " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_sampler_that_adds_noise_cannot_be_run_backwards(run: Path, photo: Path, tmp_path: Path) -> None:
    done = call_diffkit("invert", run, photo, "-o", tmp_path / "out", "--sampler", "ancestral")
    assert done.returncode == ExitCode.USAGE
    assert "adds noise, so it cannot be run backwards" in done.stderr


def test_films_of_unknown_kinds_and_of_nothing_are_refused(run: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("interpolate", run, "-o", tmp_path / "a.avi", "--seeds", "0,1"), ".avi is no kind of film"),
        (("interpolate", run, "-o", tmp_path / "a.gif"), "Between what?"),
        (("interpolate", run, "-o", tmp_path / "a.gif", "--seeds", "0"), "One image leads nowhere"),
        (("interpolate", run, "-o", tmp_path / "a.gif", "--seeds", "0,x"), "takes a list of numbers"),
        (("trajectory", run, "-o", tmp_path / "a.webm"), ".webm is no kind of film"),
    ):
        done = call_diffkit(*arguments)
        assert done.returncode == ExitCode.USAGE
        assert words in done.stderr


def test_a_guide_of_another_size_is_refused_and_an_earlier_checkpoint_guides(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    other = tmp_path / "small"
    done = run_diffkit("train", dataset, "-o", other, "--steps", 2, "--size", 8, *TINY)
    assert done.returncode == 0, done.stderr
    done = call_diffkit("sample", run, "-o", tmp_path / "a", "--guide", other, "--device", "cpu")
    assert done.returncode == ExitCode.USAGE
    assert "The guide makes images of 8x8x3, the model of 12x12x3" in done.stderr
    (checkpoint, *_) = sorted((run / "checkpoints").iterdir())
    plain, guided = (
        call_diffkit("sample", run, "-o", tmp_path / name, "-n", 2, "--steps", 4, "--device", "cpu", *more)
        for name, more in (("plain", ()), ("guided", ("--guide", checkpoint, "--guide-scale", 3)))
    )
    assert (plain.returncode, guided.returncode) == (0, 0), guided.stderr
    assert "4 steps = 8 network calls" in guided.stderr
    # The guide is this very model here, so it leads nowhere.
    assert np.abs(opened(tmp_path / "plain/high/000000.png") - opened(tmp_path / "guided/high/000000.png")).max() <= 1


def test_a_guide_that_is_worse_moves_the_images(run: Path, dataset: Path, tmp_path: Path) -> None:
    done = run_diffkit("train", dataset, "-o", tmp_path / "guide", "--steps", 2, "--precision", "float32", *TINY)
    assert done.returncode == 0, done.stderr
    model, guide = diffkit.load(run, device="cpu"), diffkit.load(tmp_path / "guide", device="cpu")
    plain, moved, further = (
        model.sample(4, steps=4, guide=guide, guide_scale=scale).astype(int) for scale in (1.0, 2.0, 3.0)
    )
    assert 0 < np.abs(moved - plain).mean() < np.abs(further - plain).mean()


def test_guidance_of_an_unconditional_model_names_the_other_kind(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"x": 30})
    done = run_diffkit("prepare", tmp_path / "images", "-o", tmp_path / "set", "--size", 12, "--holdout", 0)
    assert done.returncode == 0, done.stderr
    done = run_diffkit("train", tmp_path / "set", "-o", tmp_path / "run", "--steps", 2, *TINY)
    assert done.returncode == 0, done.stderr
    with pytest.raises(DiffkitError, match=r"nothing to guide it to.*--guide RUN_OR_CHECKPOINT"):
        diffkit.load(tmp_path / "run", device="cpu").plan(guidance=2.0)
