"""What a network is made of: stages, their output shapes, parameters and operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StageFacts:
    """One stage of a network for one image. gflops: 1e9 operations of the forward pass, a multiply-add counted as 2."""

    name: str
    resolution: str
    channels: int
    blocks: int
    attention: bool
    parameters: int
    gflops: float


def anatomy(network: nn.Module, inputs: tuple[Tensor, ...], condition: dict[str, Tensor]) -> list[StageFacts]:
    """The stages in the order in which they run; network and inputs may be on the meta device, batch size 1."""
    stages = dict(_stages(network))
    shapes: dict[str, torch.Size] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, result, name=name: shapes.update({name: result.shape}))
        for name, module in stages.items()
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs, **condition)
    for hook in hooks:
        hook.remove()
    counts: dict[str, Any] = counter.get_flop_counts()
    root = type(network).__name__
    return [
        _facts(name, stages[name], shape, sum(counts.get(f"{root}.{name}", {}).values()))
        for name, shape in shapes.items()
    ]


def _stages(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children; lists of modules are opened once."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", inner) for number, inner in enumerate(child))
        else:
            yield name, child


def _facts(name: str, module: nn.Module, shape: torch.Size, flops: int) -> StageFacts:
    image = len(shape) == 4
    kinds = [type(inner).__name__.lower() for inner in module.modules()]
    return StageFacts(
        name=name,
        resolution=f"{shape[2]}x{shape[3]}" if image else "",
        channels=int(shape[1]),
        blocks=sum("block" in kind for kind in kinds),
        attention=any("attention" in kind for kind in kinds),
        parameters=sum(p.numel() for p in module.parameters()),
        gflops=flops / 1e9,
    )
