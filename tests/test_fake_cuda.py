"""The U-Net on fake CUDA tensors: devices, types, layouts, and what it moves through memory."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkit.backbones.norm import GroupNorm
from diffkit.backbones.unet import Attention, Block, doubled, repeated, unet
from diffkit.interfaces import ImageSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BF16, F32 = torch.bfloat16, torch.float32
BEFORE = 1060.4e6  # bytes beside convolutions, an image and step, when the residual stream was float32
IMAGES = 7
INNER = (Block, Attention, GroupNorm, nn.Conv2d)


@pytest.fixture(scope="module")
def gpu_bytes() -> Any:
    spec = spec_from_file_location("gpu_bytes", BENCHMARKS / "gpu_bytes.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noted(network: nn.Module) -> dict[str, list[Tensor]]:
    """What goes into and comes out of every layer, as it is called."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        return lambda _m, given, result: found.update({name: [*(t for t in given if isinstance(t, Tensor)), result]})

    for name, module in network.named_modules():
        module.register_forward_hook(note(name))
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("backbone", "options"), [("unet", {}), ("unet_classic", {"checkpoint": 1})])
def test_all_between_stem_and_head_is_bfloat16_with_the_channels_last(
    gpu_bytes: Any, backbone: str, options: dict[str, Any], fused: bool
) -> None:
    with gpu_bytes.fake_cuda():
        network = gpu_bytes.built(backbone, "tiny", 64, fused=fused, **options)
        found = noted(network)
        traffic = gpu_bytes.step(network, IMAGES, 64)
    kinds = dict(network.named_modules())
    layers = {name: seen for name, seen in found.items() if isinstance(kinds[name], INNER) and name != "stem"}
    convolutions = {name for name in found if isinstance(kinds[name], nn.Conv2d)}
    assert len(layers) > 30 and len(convolutions) > 20
    for name, seen in layers.items():
        whole = isinstance(kinds[name], Block | Attention)
        assert {each.dtype for each in seen} == {BF16} or not whole, name
        if not whole and not fused:  # torch's own norm puts the channels first
            continue
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen if each.dim() == 4), name
    assert all(each.device == torch.device("cuda", 0) for seen in found.values() for each in seen)
    outer = {"stem", "head.2"}
    assert {name for name in convolutions if found[name][-1].dtype == F32} == outer
    assert found[""][-1].dtype == F32
    # Of the images themselves only the stem's result is cast, and its gradient; torch's norms cast theirs.
    cast = [shape for shape in traffic.casts if len(shape) == 4 and shape[0] == IMAGES]
    if fused:
        assert len(cast) == 2
    assert fused or len(cast) > 4


def test_in_float32_nothing_is_cast(gpu_bytes: Any) -> None:
    with gpu_bytes.fake_cuda():
        network = gpu_bytes.built("unet", "tiny", 32, fused=True)
        found = noted(network)
        traffic = gpu_bytes.step(network, IMAGES, 32, precision=None)
    assert {each.dtype for seen in found.values() for each in seen} == {F32}
    assert traffic.casts == []


def test_what_a_step_moves_beside_convolutions_does_not_grow(gpu_bytes: Any) -> None:
    """Base preset at 128x128, one image's share of a batch of 64; and the figures that are kept are these."""
    kept = json.loads((BENCHMARKS / "results" / "gpu-bytes.json").read_text())["unet base 128x128"]
    assert kept["before"]["MB_beside_convolutions"] == BEFORE / 1e6
    for name, limit in zip(gpu_bytes.WAYS, (0.911 * BEFORE, 0.231 * BEFORE, 0.231 * BEFORE), strict=True):
        with gpu_bytes.fake_cuda():
            traffic = gpu_bytes.step(gpu_bytes.run(name, "unet", "base", 128), 64, 128)
        found = gpu_bytes.figures(traffic, 64)
        assert traffic.beside() / 64 <= limit, found
        assert found["kernels"] <= kept[name]["kernels"] and found["casts"] <= kept[name]["casts"], found
        if torch.__version__.split("+")[0] == kept["torch"]:
            assert found == {key: kept[name][key] for key in found}
    assert (traffic.beside() + traffic.again.total()) / 64 <= 0.289 * BEFORE
    assert len(traffic.casts) <= 40  # in the last of the ways, that of a training


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling_by_broadcasting_is_interpolation(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
    y, wanted = repeated(x), F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(y, wanted) and torch.equal(doubled(x), wanted)
    assert y.is_contiguous(memory_format=layout)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    exact = grad.double().unflatten(2, (5, 2)).unflatten(4, (4, 2)).sum((3, 5))
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == BF16 else 1e-5, atol=1e-5)


class Drawn(Exception):
    """The state of the generator has been asked for."""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_dropout_asks_for_the_generator_when_activations_are_computed_again(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph cannot be recorded of what does."""

    def refuse(*_: object, **__: object) -> None:
        raise Drawn

    network = unet(ImageSpec(3, 8, 8), width=8, multipliers=(1, 2), blocks=1, dropout=dropout, checkpoint=2)
    x = torch.randn(1, 3, 8, 8)
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    network.eval()(x, torch.zeros(1)).sum().backward()
    network.train()
    if dropout:
        with pytest.raises(Drawn):
            network(x, torch.zeros(1))
    else:
        network(x, torch.zeros(1)).sum().backward()


@pytest.mark.parametrize("checkpoint", [0, 1])
def test_the_network_is_one_graph(checkpoint: int) -> None:
    spec = ImageSpec(3, 8, 8, ("a", "b"))
    options: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "blocks": 1, "resample": "plain", "skips": "add"}
    network, x = unet(spec, **options, checkpoint=checkpoint), torch.randn(2, 3, 8, 8)
    nn.init.normal_(network.head[-1].weight)
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=BF16):
        found, wanted = (each(x, torch.zeros(2), label=torch.eye(2)) for each in (compiled, network))
    assert torch.equal(found, wanted)
    one, other = (torch.autograd.grad(each.square().sum(), [*network.parameters()]) for each in (found, wanted))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
