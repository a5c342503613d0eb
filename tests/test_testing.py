"""The checks for parts pass what keeps the contract and fail, saying why, what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffkit.interfaces import Coefficients, Example, ImageSpec
from diffkit.testing import check_backbone, check_dataset, check_prediction, check_sampler, check_schedule


def fails(check: Callable[..., None], part: Callable[..., Any], words: str, *rest: Any, **options: Any) -> None:
    """`check` refuses `part`, and names it, with `words` in its message."""
    with pytest.raises(AssertionError, match=words) as caught:
        check(part, *rest, **options)
    message = str(caught.value)
    assert message.startswith(f"{part.__name__}: wanted ") and ", got " in message


# Schedules.


def power(t: Tensor, *, exponent: float = 2.0, top: float = 80.0) -> Tensor:
    return top * t**exponent


def single_precision(t: Tensor) -> Tensor:
    return t.float()


def falling(t: Tensor) -> Tensor:
    return 1 - t


def flat_in_the_middle(t: Tensor) -> Tensor:
    return torch.where((t > 0.4) & (t < 0.5), 0.4, t)


def reaching_zero(t: Tensor) -> Tensor:
    return (t - 0.1).clamp(min=0)


def infinite(t: Tensor) -> Tensor:
    return torch.where(t > 0.9, torch.inf, t)


def of_its_company(t: Tensor) -> Tensor:
    return t / t.max()


def in_place(t: Tensor) -> Tensor:
    return t.mul_(2)


def random_level(t: Tensor) -> Tensor:
    return t * (1 + torch.rand(()).double())


def flattened(t: Tensor) -> Tensor:
    return t.flatten()


def positional_option(t: Tensor, top: float = 80.0) -> Tensor:
    return top * t


def unannotated_option(t: Tensor, *, top=80.0) -> Tensor:  # type: ignore[no-untyped-def]
    return top * t


def without_default(t: Tensor, *, top: float) -> Tensor:
    return top * t


def any_options(t: Tensor, **options: float) -> Tensor:
    return t


def test_a_good_schedule_passes_with_and_without_options() -> None:
    check_schedule(power)
    check_schedule(power, exponent=3.0)
    check_schedule(without_default, top=2.0)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (single_precision, "float64, got torch.float32"),
        (falling, "strictly increasing"),
        (flat_in_the_middle, "strictly increasing in t, got no rise after 0.4 at 0.4"),
        (reaching_zero, "s > 0 everywhere, got 0 at 1e-06"),
        (infinite, "finite everywhere, got inf at 0.9"),
        (of_its_company, "alone, as among others"),
        (in_place, "changed in place"),
        (random_level, "the same s at every call"),
        (flattened, r"of the shape of the input, \(2, 3\)"),
        (positional_option, r"1 positional parameters before .* got 2 \(t, top\)"),
        (unannotated_option, "a type annotation on option 'top'"),
        (without_default, "a default for option 'top'"),
        (any_options, "every option by its own name"),
    ],
)
def test_a_bad_schedule_is_refused(part: Callable[..., Tensor], words: str) -> None:
    fails(check_schedule, part, words)


def test_an_unknown_option_is_refused() -> None:
    fails(check_schedule, power, r"one of the options \['exponent', 'top'\], got 'exponnt'", exponnt=2.0)


# Prediction types.


def velocity(s: Tensor) -> Coefficients:
    inp = (1 + s**2).rsqrt()
    return Coefficients(inp**2, -s * inp, inp)


def preconditioned(s: Tensor, *, sigma_data: float) -> Coefficients:
    total = s**2 + sigma_data**2
    return Coefficients(sigma_data**2 / total, s * sigma_data * total.rsqrt(), total.rsqrt())


def bare_tuple(s: Tensor) -> Any:
    return tuple(velocity(s))


def no_output(s: Tensor) -> Coefficients:
    return Coefficients(torch.zeros_like(s), torch.where(s > 100, 0.0, 1.0).double(), (1 + s**2).rsqrt())


def negative_input(s: Tensor) -> Coefficients:
    return velocity(s)._replace(inp=-((1 + s**2).rsqrt()))


def input_not_scaled(s: Tensor) -> Coefficients:
    return Coefficients(torch.zeros_like(s), torch.ones_like(s), torch.ones_like(s))


def tiny_output(s: Tensor) -> Coefficients:
    return Coefficients(torch.zeros_like(s), torch.full_like(s, 1e-4), (1 + s**2).rsqrt())


def half_the_noise(s: Tensor) -> Coefficients:
    return velocity(s)._replace(skip=s.float())


def required_option(s: Tensor, *, gamma: float) -> Coefficients:
    return velocity(s)


def test_good_predictions_pass_and_sigma_data_is_filled_in() -> None:
    check_prediction(velocity)
    check_prediction(preconditioned)
    check_prediction(preconditioned, sigma_data=0.3)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (bare_tuple, "Coefficients"),
        (no_output, "out != 0 everywhere, got 0 at 10"),
        (negative_input, "inp > 0"),
        (input_not_scaled, "inp .* x of variance between"),
        (tiny_output, "a target of RMS below 1000"),
        (half_the_noise, "skip in torch.float64, got torch.float32"),
        (required_option, "a default for option 'gamma'"),
    ],
)
def test_a_bad_prediction_is_refused(part: Callable[..., Coefficients], words: str) -> None:
    fails(check_prediction, part, words)


# Samplers.


def euler(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x = x + (s_next - s) / s * (x - denoise(x, s))
        yield x


def noisy(denoise: Any, x: Tensor, sigmas: Any, noise: Any, *, share: float = 0.5) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        up = share * s_next * (1 - (s_next / s) ** 2) ** 0.5
        down = (s_next**2 - up**2) ** 0.5
        x = x + (down - s) / s * (x - denoise(x, s)) + up * noise(s, s_next)
        yield x


def changes_x(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x += (s_next - s) / s * (x - denoise(x, s))
        yield x.clone()


def changes_what_it_yielded(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    x = x.clone()
    for s, s_next in pairwise(sigmas):
        x += (s_next - s) / s * (x - denoise(x, s))
        yield x


def changes_the_answer(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x = denoise(x, s).lerp_(x, s_next / s)
        yield x


def minds_the_batch(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for state in euler(denoise, x, sigmas, noise):
        yield state - 0.01 * state.mean()


def only_the_first(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for state in euler(denoise, x[:1], sigmas, noise):
        yield state.expand(len(x), -1, -1, -1)


def yields_the_start(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    yield x
    yield from euler(denoise, x, sigmas, noise)


def its_own_noise(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    yield from noisy(denoise, x, sigmas, lambda s, s_next: torch.randn_like(x))


def tensor_levels(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    yield from euler(denoise, x, torch.tensor(sigmas), noise)


def looks_at_zero(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x = denoise(x, s).lerp(x, s_next / s)
        denoise(x, s_next)
        yield x


def holds_inference_mode(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    with torch.inference_mode():
        yield from euler(denoise, x, sigmas, noise)


def too_much_noise(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x = x + (s_next - s) / s * (x - denoise(x, s)) + 0.1 * s_next * noise(s, s_next)
        yield x


def half_way(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for s, s_next in pairwise(sigmas):
        x = x + 0.9 * (s_next - s) / s * (x - denoise(x, s))
        yield x


def divides_by_the_last(denoise: Any, x: Tensor, sigmas: Any, noise: Any) -> Iterator[Tensor]:
    for state in euler(denoise, x, sigmas, noise):
        yield state * (torch.tensor(sigmas[-1]) / sigmas[-1] if sigmas[-1] else torch.tensor(torch.nan))


def test_good_samplers_pass() -> None:
    check_sampler(euler)
    check_sampler(noisy)
    check_sampler(noisy, share=0.9)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (changes_x, "the x it started from left as it was, got it was changed in place"),
        (changes_what_it_yielded, "a state it had yielded left as it was"),
        (changes_the_answer, "denoise's answer left as it was"),
        (minds_the_batch, "image 1 alone as in a batch of 3"),
        (only_the_first, r"x of shape \(3, 2, 4, 5\), got \(1, 2, 4, 5\)"),
        (yields_the_start, "5 states .* got 6"),
        (its_own_noise, "the same states from the same x and noise"),
        (tensor_levels, "with s a Python float, or a float64 tensor .* got Tensor"),
        (looks_at_zero, "with s > 0, got s = 0.0"),
        (holds_inference_mode, "not held across a yield"),
        (too_much_noise, r"a deviation of 0\.\d+ after 4\d\d steps"),
        (half_way, "a (mean|deviation) of"),
        (divides_by_the_last, "finite states on the grid"),
    ],
)
def test_a_bad_sampler_is_refused(part: Callable[..., Iterator[Tensor]], words: str) -> None:
    fails(check_sampler, part, words)


# Backbones.


class Tiny(nn.Module):
    """A convolution, steered by the noise level, the label and the conditioning image."""

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.first = nn.Conv2d(spec.channels + spec.image_channels, 8, 3, padding=1)
        self.level = nn.Linear(1, 8)
        self.label = nn.Linear(spec.label_width, 8, bias=False) if spec.classes else None
        self.last = nn.Conv2d(8, spec.channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, x: Tensor, c_noise: Tensor, *, label: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        h = self.first(x if image is None else torch.cat([x, image], 1))
        steering = self.level(c_noise[:, None])
        if self.label is not None and label is not None:
            steering = steering + self.label(label)
        out: Tensor = self.last((h + steering[:, :, None, None]).tanh())
        return out


def tiny(spec: ImageSpec) -> nn.Module:
    return Tiny(spec)


class MixesTheBatch(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x, c_noise, **condition)
        return y - y.mean(0, keepdim=True)


class RoundsTheSides(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x, c_noise, **condition)
        return y[:, :, : y.shape[2] // 4 * 4, : y.shape[3] // 4 * 4]


class IgnoresTheLabel(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, c_noise, **{k: v * 0 if k == "label" else v for k, v in condition.items()})


class MissesALabel(Tiny):
    def forward(  # type: ignore[override]
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, **condition: Tensor
    ) -> Tensor:
        label = x.new_ones(len(x), 3) if label is None and self.label is not None else label
        return super().forward(x, c_noise, label=label, **condition)


class HasASparePart(Tiny):
    def __init__(self, spec: ImageSpec) -> None:
        super().__init__(spec)
        self.spare = nn.Linear(2, 2)


class InHalfPrecision(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, c_noise, **condition).bfloat16()


class SharesWeights(Tiny):
    def __init__(self, spec: ImageSpec) -> None:
        super().__init__(spec)
        self.level_again = self.level


class ForgetsAConstant(Tiny):
    made = 0

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__(spec)
        type(self).made += 1
        self.constant = float(self.made)

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, c_noise * self.constant, **condition)


class ChangesItsInput(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.mul_(0.5), c_noise, **condition)


class NeverStill(Tiny):
    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(nn.functional.dropout(x), c_noise, **condition)


def test_a_good_backbone_passes_and_the_global_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    check_backbone(tiny)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (MixesTheBatch, "image 1 alone as in a batch of 2 for 1x12x20"),
        (RoundsTheSides, r"an output of shape \(2, 3, 17, 23\) for 3x17x23, got \(2, 3, 16, 20\)"),
        (IgnoresTheLabel, "an output that depends on 'label' for 3x24x24 and label"),
        (MissesALabel, "label zeros to mean no label"),
        (HasASparePart, "a gradient at every parameter for 3x24x24, got none at spare.weight"),
        (InHalfPrecision, "a float32 output for 1x12x20, got torch.bfloat16"),
        (SharesWeights, "a state dict that safetensors can store"),
        (ForgetsAConstant, "the same output from a new network with the state dict"),
        (ChangesItsInput, "x left as it was"),
        (NeverStill, "the same output twice in eval mode"),
    ],
)
def test_a_bad_backbone_is_refused(network: type[Tiny], words: str) -> None:
    def part(spec: ImageSpec) -> nn.Module:
        return network(spec)

    fails(check_backbone, part, words)


# Dataset sources.


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 3), (value, 2 * value, 0))


def mixed(path: str, *, count: int = 4) -> Iterator[Example]:
    """Every kind of image that an Example may carry."""
    file = Path(path) / "a.png"
    array = np.full((3, 4), 7, np.uint8)
    images = [picture(1), array, file, lambda: picture(2)]
    for number in range(count):
        yield Example(images[number], label="even" if number % 2 == 0 else None, id=f"{number}")


def changing(path: str) -> Iterator[Example]:
    changing.calls = getattr(changing, "calls", 0) + 1  # type: ignore[attr-defined]
    yield Example(picture(changing.calls))  # type: ignore[attr-defined]


def shrinking(path: str) -> Iterator[Example]:
    shrinking.left = getattr(shrinking, "left", 4) - 1  # type: ignore[attr-defined]
    yield from (Example(picture(n)) for n in range(shrinking.left))  # type: ignore[attr-defined]


def empty(path: str) -> Iterator[Example]:
    yield from ()


def same_id(path: str) -> Iterator[Example]:
    yield from (Example(picture(n), id="one") for n in range(2))


def numbered_label(path: str) -> Iterator[Example]:
    yield Example(picture(1), label=3)  # type: ignore[arg-type]


def float_array(path: str) -> Iterator[Example]:
    yield Example(np.zeros((3, 4), np.float32))  # type: ignore[arg-type]


def channels_first(path: str) -> Iterator[Example]:
    yield Example(np.zeros((3, 4, 5), np.uint8))


def missing_file(path: str) -> Iterator[Example]:
    yield Example(Path(path) / "nowhere.png")


def path_as_text(path: str) -> Iterator[Example]:
    yield Example(f"{path}/a.png")  # type: ignore[arg-type]


def bare_image(path: str) -> Iterator[Any]:
    yield picture(1)


def as_list(path: str) -> Any:
    return list(mixed(path))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    picture(3).save(tmp_path / "a.png")
    return tmp_path


def test_a_good_dataset_source_passes(data: Path) -> None:
    check_dataset(mixed, data)
    check_dataset(mixed, str(data), count=2)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (changing, "example 0 to be the same at every call"),
        (shrinking, "3 examples again at the second call, got 2"),
        (empty, "at least one Example, got none"),
        (same_id, r"an id of its own for each Example, got \['one'\] more than once"),
        (numbered_label, "a string or None as label, got 3"),
        (float_array, "an image array in uint8, got float32"),
        (channels_first, r"an image array \[H, W\]"),
        (missing_file, "the path of an existing file"),
        (path_as_text, "a Path or a function returning a Pillow image, got str"),
        (bare_image, "diffkit.interfaces.Example, got Image"),
        (as_list, "an iterator"),
    ],
)
def test_a_bad_dataset_source_is_refused(data: Path, part: Callable[..., Any], words: str) -> None:
    fails(check_dataset, part, words, data)
