"""Settings: the notation of parts, types, unknown names, and the way through TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from diffkit.config import (
    PartChoice,
    Settings,
    parse_part,
    put,
    read_toml,
    resolve_options,
    set_from_text,
    to_toml,
    validated,
)
from diffkit.errors import DiffkitError


def part(
    x: float, *, rho: float = 7.0, flag: bool = False, sizes: tuple[int, ...] = (1,), mode: Literal["a", "b"] = "a"
) -> None:
    """An example of a part."""


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("karras", "karras", {}),
        ("karras:rho=5", "karras", {"rho": 5}),
        ("karras:rho=5.5,sigma_max=1e2", "karras", {"rho": 5.5, "sigma_max": 100.0}),
        ("unet:multipliers=[1,2,2],width=64", "unet", {"multipliers": [1, 2, 2], "width": 64}),
        ("mine/bend:mode=soft,on=true", "mine/bend", {"mode": "soft", "on": True}),
    ],
)
def test_a_part_is_written_name_key_value(text: str, name: str, options: dict[str, object]) -> None:
    assert parse_part(text) == {"name": name, "options": options}
    choice = PartChoice.model_validate(text)
    assert PartChoice.model_validate(str(choice)) == choice


@pytest.mark.parametrize("text", ["", ":rho=5", "karras:rho", "karras:=5", "karras:rho=5,"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(DiffkitError, match=r"not an option|names no part"):
        parse_part(text)


def test_options_are_completed_with_defaults_and_types() -> None:
    assert resolve_options("Part x", part, {"rho": "5", "sizes": [1, 2], "flag": "False"}) == {
        "rho": 5.0,
        "flag": False,
        "sizes": (1, 2),
        "mode": "a",
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"roh": 5}, "no option 'roh'. Did you mean 'rho'"),
        ({"rho": "much"}, "rho = 'much' does not fit"),
        ({"flag": "maybe"}, "flag = 'maybe' does not fit"),
        ({"sizes": [1, "x"]}, "does not fit"),
        ({"mode": "c"}, "does not fit"),
    ],
)
def test_wrong_options_are_explained(given: dict[str, object], words: str) -> None:
    with pytest.raises(DiffkitError, match=words):
        resolve_options("Part x", part, given)


def test_context_fills_what_is_not_given() -> None:
    def edm(s: float, *, sigma_data: float) -> None: ...

    assert resolve_options("Prediction edm", edm, {}, {"sigma_data": 0.6}) == {"sigma_data": 0.6}
    assert resolve_options("Prediction edm", edm, {"sigma_data": 1}, {"sigma_data": 0.6}) == {"sigma_data": 1.0}
    with pytest.raises(DiffkitError, match="needs the option 'sigma_data'"):
        resolve_options("Prediction edm", edm, {})


def test_settings_survive_toml(tmp_path: Path) -> None:
    settings = validated(
        {
            "scheduler": {"name": "karras", "rho": 5.0},
            "backbone": "unet:width=64,multipliers=[1,2]",
            "train": {"lr": 1e-3, "batch_size": 7},
            "data": {"size": [96, 128]},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(settings))
    assert validated(read_toml(path)) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, "Unknown setting 'trian'. Did you mean 'train'"),
        ({"train": {"batchsize": 3}}, "Unknown setting 'train.batchsize'. Did you mean 'batch_size'"),
        ({"train": {"lr": "nan"}}, "train.lr"),
        ({"train": {"lr": -1}}, "greater than 0"),
        ({"train": {"batch_size": 0}}, "train.batch_size"),
        ({"train": {"precision": "float16"}}, "train.precision"),
        ({"data": {"flip": "perhaps"}}, "data.flip"),
        ({"noise": {"s_min": 0}}, "noise.s_min"),
        ({"sample": {"steps": 0}}, "sample.steps"),
    ],
)
def test_bad_settings_name_the_key(values: dict[str, object], words: str) -> None:
    with pytest.raises(DiffkitError, match=words):
        validated(values)


def test_a_dotted_key_reaches_into_tables_and_parts() -> None:
    values: dict[str, object] = {"scheduler": "karras:rho=5"}
    set_from_text(values, "train.clip=0.5")
    set_from_text(values, "scheduler.sigma_max=10")
    assert values == {"scheduler": {"name": "karras", "rho": 5, "sigma_max": 10}, "train": {"clip": 0.5}}
    with pytest.raises(DiffkitError, match="no assignment"):
        set_from_text(values, "train.clip")
    with pytest.raises(DiffkitError, match="which is a value"):
        put(values, "train.clip.x", 1)


def test_unreadable_toml_is_an_error_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(DiffkitError, match="Cannot read"):
        read_toml(path)
    path.write_text("train = [")
    with pytest.raises(DiffkitError, match="not valid TOML"):
        read_toml(path)


def test_defaults_are_valid() -> None:
    assert validated({}) == Settings()
