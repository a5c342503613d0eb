"""The U-Net: any size, any channels, conditioned; its presets; what `diffkit show` says of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from diffkit.backbones.presets import PRESETS, classic_preset, unet_preset
from diffkit.backbones.unet import Attention, Block, unet, unet_classic
from diffkit.engine.anatomy import anatomy
from diffkit.engine.devices import activation_bytes, autocast
from diffkit.errors import DiffkitError
from diffkit.interfaces import ImageSpec
from diffkit.testing import check_backbone

SMALL = {"width": 16, "multipliers": (1, 2), "blocks": 1}


LEAN = {**SMALL, "resample": "plain", "skips": "add"}
OPTIONS = [
    SMALL,
    {**SMALL, "patch": 2, "attention": 4},
    LEAN,
    {**SMALL, "skips": "add"},
    {**SMALL, "resample": "plain"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_unet_keeps_the_contract(options: dict[str, object]) -> None:
    check_backbone(unet, **options)


def test_models_of_before_the_lean_presets_are_what_they_were() -> None:
    """Their recorded options, without those that came later: the figures are those of the network of then."""
    for backbone in (unet, unet_classic):
        network = backbone(
            ImageSpec(3, 32, 32, ("a", "b")), width=32, multipliers=(1, 2, 2), blocks=1, attention=16, patch=2
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
        assert sum(p.numel() for p in network.parameters()) == 1_307_180
        x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        y = network.eval()(x, torch.tensor([0.3]), label=torch.tensor([[1.0, 0.0]])).detach().double()
        assert float(y.sum()) == pytest.approx(37.0440, rel=1e-4)
        assert float(y.square().sum()) == pytest.approx(14.25709, rel=1e-4)


def test_every_level_of_the_encoder_reaches_the_output_through_its_skip() -> None:
    """With the bottleneck cut off, the image still comes through; what the skips carry is not lost when it is added."""
    spec, x = ImageSpec(3, 16, 16), torch.randn(2, 3, 16, 16)
    for skips in ("concat", "add"):
        network = randomised(unet(spec, **{**LEAN, "multipliers": (1, 2, 2), "skips": skips}))
        inputs: list[torch.Tensor] = []

        def note(_module: nn.Module, _inputs: object, result: torch.Tensor, kept: Any = inputs) -> None:
            result.retain_grad()
            kept.append(result)

        for stage in network.encoder:
            stage.register_forward_hook(note)
        network.bottleneck.register_forward_hook(lambda _m, _i, result: result.detach() * 0)
        network(x, torch.zeros(2)).square().sum().backward()
        assert len(inputs) == 3
        assert all(each.grad is not None and float(each.grad.abs().max()) > 0 for each in inputs)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (17, 23), (16, 40), (96, 128)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_height_width_and_channel_count_comes_back(size: tuple[int, int], channels: int) -> None:
    network = unet(ImageSpec(channels, *size), patch=2, **{**SMALL, "multipliers": (1, 2, 2)})
    x = torch.randn(2, channels, *size)
    assert network(x, torch.zeros(2)).shape == x.shape


def test_a_new_network_predicts_zero() -> None:
    network = unet(ImageSpec(3, 16, 16), **SMALL)
    assert network(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max().item() == 0


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_computed_again_change_nothing_but_memory(precision: str) -> None:
    """Dropout included: what is computed again draws the same numbers."""
    spec, gradients, kept = ImageSpec(3, 16, 16, ("a",)), [], []
    for checkpoint in (0, 1, 2):
        torch.manual_seed(0)
        network = unet(spec, **SMALL, attention=8, dropout=0.3, checkpoint=checkpoint)
        randomised(network).train()
        x, label = torch.randn(2, 3, 16, 16), torch.ones(2, 1)

        def forward(network: nn.Module = network, x: torch.Tensor = x, label: torch.Tensor = label) -> torch.Tensor:
            torch.manual_seed(1)
            with autocast(torch.device("cpu"), precision)():
                return network(x, torch.zeros(2), label=label)

        forward().square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        kept.append(activation_bytes(forward))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
    assert kept[1] < 0.8 * kept[0] and kept[2] < kept[1]


def test_noise_level_label_and_image_each_change_the_output() -> None:
    network = randomised(unet(ImageSpec(3, 16, 16, ("a", "b"), image_channels=2), **SMALL))
    x, image = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16)
    a, b = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    base = network(x, torch.zeros(2), label=a, image=image)
    others = [
        network(x, torch.zeros(2) + 0.1, label=a, image=image),
        network(x, torch.zeros(2), label=b, image=image),
        network(x, torch.zeros(2), label=a, image=-image),
        network(x, torch.zeros(2), label=a),
        network(x, torch.zeros(2), label=0 * a, image=image),
    ]
    assert all((other - base).abs().max().item() > 1e-3 for other in others)


def test_an_absent_image_differs_from_a_black_one() -> None:
    network = randomised(unet(ImageSpec(3, 16, 16, image_channels=2), **SMALL))
    x = torch.randn(2, 3, 16, 16)
    zeros = network(x, torch.zeros(2), image=torch.zeros(2, 2, 16, 16))
    assert (network(x, torch.zeros(2)) - zeros).abs().max().item() > 1e-3


def test_attention_is_softmax_over_all_positions() -> None:
    attention = randomised(Attention(128))
    x = torch.randn(2, 128, 3, 5)
    assert attention.heads == 2
    q, k, v = attention.qkv(attention.norm(x)).view(2, 3, 2, 64, 15).unbind(1)
    weights = torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / 64**0.5, dim=-1)
    mixed = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.out(mixed), rtol=1e-4, atol=1e-5)


def test_attention_is_where_it_was_asked_for() -> None:
    network = unet(ImageSpec(3, 32, 32), width=16, multipliers=(1, 2, 2), blocks=1, attention=16)
    assert [any(isinstance(m, Attention) for m in stage.modules()) for stage in network.encoder] == [False, True, True]
    none = unet(ImageSpec(3, 32, 32), width=16, multipliers=(1, 2, 2), blocks=1, attention=0)
    assert not any(isinstance(m, Attention) for m in none.modules())


def test_the_output_is_float32_under_bfloat16_and_close_to_full_precision() -> None:
    network = randomised(unet(ImageSpec(3, 16, 16), **SMALL))
    x = torch.randn(4, 3, 16, 16)
    full = network(x, torch.zeros(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x, torch.zeros(4))
    assert half.dtype == torch.float32
    assert ((half - full).square().mean().sqrt() / full.square().mean().sqrt()).item() < 0.03


def test_dropout_acts_in_training_only() -> None:
    network = randomised(unet(ImageSpec(3, 8, 8), dropout=0.5, **SMALL))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(x, torch.zeros(2)), network(x, torch.zeros(2)))
    network.train()
    assert not torch.equal(network(x, torch.zeros(2)), network(x, torch.zeros(2)))


@pytest.mark.parametrize("side", [8, 16, 32, 64, 96, 128, 256, 512])
@pytest.mark.parametrize(("backbone", "preset"), [(unet, unet_preset), (unet_classic, classic_preset)])
def test_presets_grow_and_fit_every_size(side: int, backbone: Any, preset: Any) -> None:
    spec = ImageSpec(3, side, side)
    sizes = []
    for name in PRESETS:
        with torch.device("meta"):
            network = backbone(spec, **preset(name, spec))
        assert network(torch.zeros(1, 3, side, side, device="meta"), torch.zeros(1, device="meta")).shape[2] == side
        sizes.append(sum(p.numel() for p in network.parameters()))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]


def test_unusable_options_are_refused_with_a_reason() -> None:
    for options in ({"width": 0}, {"multipliers": ()}, {"blocks": 0}, {"dropout": 1.0}):
        with pytest.raises(DiffkitError, match=r"U-Net|share"):
            unet(ImageSpec(3, 16, 16), **{**SMALL, **options})


def test_anatomy_counts_every_parameter_and_the_operations_of_a_convolution() -> None:
    network = unet(ImageSpec(3, 16, 16), **SMALL)
    stages = anatomy(network, (torch.zeros(1, 3, 16, 16), torch.zeros(1)), {})
    assert sum(stage.parameters for stage in stages) == sum(p.numel() for p in network.parameters())
    stem = next(stage for stage in stages if stage.name == "stem")
    assert (stem.resolution, stem.channels) == ("16x16", 16)
    assert stem.gflops * 1e9 == 2 * 16 * 3 * 9 * 256
    assert sum(stage.blocks for stage in stages) == sum(isinstance(m, Block) for m in network.modules())


def test_a_training_step_lowers_the_error() -> None:
    torch.manual_seed(0)
    network = unet(ImageSpec(1, 8, 8), **SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    x, target, levels = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.linspace(-1, 1, 8)
    losses = []
    for _ in range(60):
        loss = (network(x, levels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_presets_are_found_through_the_function() -> None:
    assert unet.presets is unet_preset  # type: ignore[attr-defined]
    assert unet_classic.presets is classic_preset  # type: ignore[attr-defined]
    spec = ImageSpec(3, 32, 32)
    for preset in (unet_preset, classic_preset):
        with pytest.raises(DiffkitError, match="No preset 'tiyn'"):
            preset("tiyn", spec)
    assert partial(unet, **SMALL)(ImageSpec(1, 8, 8)) is not None
