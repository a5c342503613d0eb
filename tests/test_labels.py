"""Labels as vectors, and what is dropped of them in training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffkit.compose.wishes import class_labels, label_vector
from diffkit.engine.labels import dropped, fields, vectors
from diffkit.errors import DiffkitError
from diffkit.interfaces import Attribute, ImageSpec

SPEC = ImageSpec(3, 8, 8, ("cat", "dog"), attributes=(Attribute("age", 0.0, 10.0), Attribute("tame", 0.0, 1.0)))


def test_a_class_is_one_hot_and_an_attribute_is_value_and_presence() -> None:
    values = np.array([[10.0, 0.0], [math.nan, 1.0], [5.0, math.nan]], np.float32)
    found = vectors(SPEC, np.array([1, -1, 0]), values)
    assert found is not None
    wanted = [[0, 1, 1, 1, -1, 1], [0, 0, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]]
    assert found.tolist() == wanted
    assert vectors(ImageSpec(3, 8, 8), None, None) is None


def test_what_a_person_writes_is_the_same_vector() -> None:
    asked = label_vector(SPEC, {"dog": 1.0}, {"age": 10, "tame": 0})
    stored = vectors(SPEC, np.array([1]), np.array([[10.0, 0.0]], np.float32))
    assert stored is not None
    assert asked.tolist() == stored[0].tolist()
    assert label_vector(SPEC, {"cat": 0.7, "dog": 0.3}, {}).tolist() == pytest.approx([0.7, 0.3, 0, 0, 0, 0])


def test_all_is_dropped_together_or_one_by_one() -> None:
    label = torch.tensor([[0.0, 1.0, 0.5, 1.0, -1.0, 1.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, 1 + fields(SPEC), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = dropped(label, SPEC, uniform, 0.2)
    cat_or_dog, age, tame = found[:, 1] != 0, found[:, 3] != 0, found[:, 5] != 0
    assert torch.equal(age, found[:, 2] != 0)
    none = ~(cat_or_dog | age | tame)
    assert float(none.float().mean()) == pytest.approx(0.2 + 0.8 * 0.2**3, abs=0.01)
    assert float((~age).float().mean()) == pytest.approx(0.2 + 0.8 * 0.2, abs=0.01)


@pytest.mark.parametrize(
    ("classes", "attributes", "words"),
    [
        ({"dgo": 1.0}, {}, "No class 'dgo'.*Did you mean 'dog'"),
        ({}, {"agee": 1.0}, "No attribute 'agee'.*Did you mean 'age'"),
        ({}, {"age": 12.0}, "age = 12 lies outside.*Choose 0 to 10"),
    ],
)
def test_labels_that_the_model_never_saw_are_refused(
    classes: dict[str, float], attributes: dict[str, float], words: str
) -> None:
    with pytest.raises(DiffkitError, match=words):
        label_vector(SPEC, classes, attributes)


def test_a_model_without_labels_takes_none() -> None:
    with pytest.raises(DiffkitError, match="knows no classes"):
        class_labels(ImageSpec(3, 8, 8), ["cat"])
    with pytest.raises(DiffkitError, match="knows no attributes"):
        label_vector(ImageSpec(3, 8, 8), {}, {"age": 1.0})
