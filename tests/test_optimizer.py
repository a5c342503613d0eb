from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY
from diffkit.engine.optimizer import AdamW, clip_gradients


def pair() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    own = [torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last), torch.randn(7), torch.randn(())]
    return ([each.clone().requires_grad_() for each in own], [each.clone().requires_grad_() for each in own])


@pytest.mark.parametrize("fused", [True, None])
def test_it_takes_the_very_steps_of_torchs_class(fused: bool | None) -> None:
    """Rates that change, weight decay, and a parameter that now and then has no gradient."""
    mine, theirs = pair()
    ours = AdamW(mine, (0.9, 0.99), 0.1, fused)
    reference = torch.optim.AdamW(theirs, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
    for number in range(12):
        ours.forget_gradients()
        reference.zero_grad()
        for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if place != 1 or number % 3:
                a.grad = torch.randn(a.shape).to(a.dtype)
                b.grad = a.grad.clone()
        lr = 0.01 * (number + 1)
        reference.param_groups[0]["lr"] = lr
        ours.step(lr)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    saved = reference.state_dict()["state"]
    assert {place: set(slots) for place, slots in saved.items()} == {place: set(s) for place, s in ours.slots.items()}
    for place, slots in saved.items():
        for slot, value in slots.items():
            assert torch.equal(ours.slots[place][slot], value)


def test_what_was_saved_goes_on_as_if_nothing_had_been() -> None:
    straight, broken = pair()
    one, other = AdamW(straight, (0.9, 0.99), 0.0, True), AdamW(broken, (0.9, 0.99), 0.0, True)
    for number in range(6):
        if number == 3:
            tensors = {f"{place}.{slot}": value for place, s in other.slots.items() for slot, value in s.items()}
            # Saved in rows, whatever the parameter's layout.
            other = AdamW(broken, (0.9, 0.99), 0.0, True)
            other.restore({name: value.contiguous() for name, value in tensors.items()})
            assert other.slots[0]["exp_avg"].stride() == broken[0].stride()
        for a, b in zip(straight, broken, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        one.step(0.1)
        other.step(0.1)
        assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))


@pytest.mark.parametrize("most", [0.1, 1e6])
def test_gradients_are_clipped_as_by_torch_bitwise(most: float) -> None:
    """A parameter without a gradient does not count."""
    mine, theirs = pair()
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    true = torch.cat([each.grad.double().flatten() for each in mine[:2] if each.grad is not None]).norm()
    norm = clip_gradients(mine, most)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, most))
    assert float(norm) == pytest.approx(float(true), rel=1e-6)
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert mine[2].grad is None and float(clip_gradients(mine[2:], most)) == 0


def test_an_update_that_is_left_out_does_not_count_as_a_step() -> None:
    (parameter,) = one = [torch.ones(3, requires_grad=True)]
    optimizer = AdamW(one, (0.9, 0.99), 0.0, True)
    for finite in (True, False, True):
        parameter.grad = torch.ones(3) if finite else torch.full((3,), torch.nan)
        optimizer.step(0.1, torch.tensor(finite))
    assert float(optimizer.slots[0]["step"]) == 2 and torch.isfinite(parameter).all()


def test_a_training_begins_without_loading_torchs_compiler(dataset: Path, tmp_path: Path) -> None:
    train = [
        "train",
        str(dataset),
        "-o",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--preview-every",
        "0",
        *map(str, TINY),
    ]
    code = f"import sys; sys.argv = ['diffkit', *{train!r}]; from diffkit.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    print('torch._dynamo' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False True", done.stderr
