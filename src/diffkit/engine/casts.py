"""Weights in the type of autocast, cast by a few operations a pass instead of two operations a weight.

A pass of autocast casts each float32 weight on its own, and each gradient back: on a GPU several hundred kernels that
take longer to launch than to run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from diffkit.engine.devices import is_memory

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
AT_ONCE = 2**22
"""Numbers from which on further weights are cast by an operation of their own. Its gradients come back together, so
that several processes can sum them while the backward pass goes on."""


class CastTogether(nn.Module):
    """`network`, which in training is called with its weights in the type of autocast, cast by a few operations.

    The results are those of autocast itself, bit by bit. Parameters and their gradients stay float32: outside a call
    the network is as it was. `run_as`: what is called, the network itself or compiled. The first call under autocast
    finds out, with a copy of the network, which weights autocast casts. If that or a call with cast weights fails, the
    network is called as it is from then on. Without autocast or gradients, and under `torch.func`, it always is.
    """

    def __init__(self, network: nn.Module, run_as: nn.Module) -> None:
        super().__init__()
        self.network, self.run_as = network, run_as
        self._places: list[tuple[nn.Module, str]] | None = None

    def forward(self, x: Tensor, *rest: Tensor, **condition: Tensor) -> Tensor:
        """As the network's own."""
        inputs, device = (x, *rest), x.device.type
        result: Tensor
        if self._places == [] or not torch.is_autocast_enabled(device) or not torch.is_grad_enabled() or _transformed():
            result = self.run_as(*inputs, **condition)
            return result
        try:
            if self._places is None:
                self._places = _cast_places(self.network, inputs, condition)
            return self._with_casts(torch.get_autocast_dtype(device), inputs, condition)
        except Exception as error:
            if is_memory(error):
                raise
            result = self.run_as(*inputs, **condition)  # raises as well where the fault is not with the casts
            self._places = []
            return result

    def _with_casts(self, dtype: torch.dtype, inputs: Sequence[Tensor], condition: Mapping[str, Tensor]) -> Tensor:
        assert self._places is not None
        weights = [getattr(module, name) for module, name in self._places]
        casts = [cast for some in _runs(weights) for cast in cast_together(dtype, some)]
        try:
            for (module, name), cast in zip(self._places, casts, strict=True):
                module._parameters[name] = cast  # type: ignore[assignment]
            result: Tensor = self.run_as(*inputs, **condition)
            return result
        finally:
            for (module, name), weight in zip(self._places, weights, strict=True):
                module._parameters[name] = weight


def cast_together(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of another type, made by one operation; gradients come back in the same way."""
    return _Cast.apply(dtype, *tensors)  # type: ignore[no-any-return]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype  # type: ignore[attr-defined]
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Weights without a part in the loss have no gradient."""
        there = [gradient for gradient in gradients if gradient is not None]
        copies = iter(cast_together(ctx.dtype, there) if there else ())
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _runs(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """One after another, in lists of AT_ONCE numbers or a little more."""
    some, numbers = list[Tensor](), 0
    for tensor in tensors:
        some.append(tensor)
        numbers += tensor.numel()
        if numbers >= AT_ONCE:
            yield some
            some, numbers = [], 0
    if some:
        yield some


def _cast_places(
    network: nn.Module, inputs: Sequence[Tensor], condition: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str]]:
    """Where the float32 weights are that autocast casts whenever the network is called.

    Layers of the usual kinds that are called under autocast only. A copy is called that shares the weights, so that
    the network's own state and the random numbers that it draws stay as they are.
    """
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in LAYERS}
    inside, outside = set[str](), set[str]()
    twin = copy.deepcopy(network, {id(weight): weight for weight in network.parameters()})
    for name in layers:

        def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            (inside if torch.is_autocast_enabled(args[0].device.type) else outside).add(name)

        twin.get_submodule(name).register_forward_pre_hook(note)
    devices = [inputs[0].device] if inputs[0].device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        twin(*inputs, **condition)
    return [
        (layers[name], kind)
        for name in layers
        if name in inside - outside
        for kind, weight in layers[name]._parameters.items()
        if kind in {"weight", "bias"} and weight is not None and weight.dtype == torch.float32 and weight.requires_grad
    ]


def _transformed() -> bool:
    """Under `torch.func`, whose transforms do not know functions with gradients of their own."""
    return torch._C._are_functorch_transforms_active()
