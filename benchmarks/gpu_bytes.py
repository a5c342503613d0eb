"""What a training step moves through a GPU's memory beside its convolutions, counted without a GPU.

    python benchmarks/gpu_bytes.py [--preset base] [--size 128] [--images 64] [--backbone unet]

Forward and backward pass of the network under bfloat16 autocast, on fake CUDA tensors, which have shapes, types and
devices but no memory. Every operation that is more than a view counts as one kernel that reads its inputs once and
writes its outputs once. So the fused GroupNorm counts as one pass; its kernels read their inputs twice, which the
figures of two passes count. Operations over lists of tensors count as one, although a list may take a few launches.
Writes results/gpu-bytes.json: torch's norms, the fused ones, and these with the weights cast together, as a training
runs; beside the figures of before, which stay as they are there.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that launch nothing: views, and memory that is not written yet.
NO_KERNEL = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "empty", "empty_like"}
NO_KERNEL |= {"empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice"}
NO_KERNEL |= {"split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}
CONVOLUTIONS = {"convolution", "convolution_backward"}
WAYS = ("torch's norms", "fused norms", "fused norms, weights cast together")  # the last is how a GPU trains
FUSED = {"group_norm", "group_norm_backward"}  # their names without the namespace; torch's are native_group_norm...


def tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def in_memory(tensor: Tensor) -> int:
    """Bytes: of what is expanded, those that are there."""
    there = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(there).numel() * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Kernels and bytes by operation; of those that change the type the shapes, `casts`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.again: Counter[str] = Counter()
        self.casts: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name.rstrip("_") not in NO_KERNEL:
            inputs = list({id(each): each for each in tensors((args, kwargs))}.values())
            outputs = tensors(result)
            self.kernels[name] += 1
            self.bytes[name] += sum(map(in_memory, inputs + outputs))
            self.again[name] += sum(map(in_memory, inputs)) if name in FUSED else 0
            if name in ("_to_copy", "copy_", "_foreach_copy_") and len({each.dtype for each in inputs + outputs}) > 1:
                self.casts.append(inputs[0].shape)
        return result

    def beside(self) -> int:
        """Bytes of all but convolutions."""
        return sum(count for name, count in self.bytes.items() if name not in CONVOLUTIONS)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a GPU would choose."""
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return result


def cudnn_layout(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """Of a convolution's result: as cuDNN has it, which torch does not consider without a GPU."""
    last = torch.channels_last
    return last if last in (suggest_memory_format(x), suggest_memory_format(weight)) else torch.contiguous_format


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors made within are fake; those for CUDA are taken for such by autocast, without any GPU."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", flash),
        mock.patch("torch.random.fork_rng", lambda *_, **__: nullcontext()),
        mock.patch.object(FakeTensor, "__deepcopy__", lambda tensor, _: tensor.detach().clone()),
        mock.patch("torch._C._conv_determine_backend_memory_format", cudnn_layout),
        FakeTensorMode() as mode,
    ):
        yield mode


def backward(output: Tensor, grad: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of the leaves: autograd's own functions, called in its order.

    Its engine wants a CUDA device to be there where torch was built for one.
    """
    grads: dict[Any, dict[int, Tensor]] = {output.grad_fn: {output.output_nr: grad}}
    waits = Counter(following for node in _nodes(output.grad_fn) for following, _ in node.next_functions if following)
    ready, leaves = [(-_order(output.grad_fn), 0, output.grad_fn)], {}
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[2]
            given = grads.pop(node, {})
            if hasattr(node, "variable"):  # a leaf; the first gradient is taken as it is
                leaves[node.variable] = given[0]
                continue
            found = _call(node, [given.get(number) for number in range(len(node._input_metadata))])
            for (following, number), each in zip(node.next_functions, found, strict=True):
                if following is None:
                    continue
                if each is not None:
                    like = following._input_metadata[number]  # gradients may come unsummed over what was broadcast
                    each = (each.sum_to_size(like.shape) if each.shape != like.shape else each).to(like.dtype)
                    own = grads.setdefault(following, {})
                    own[number] = own[number] + each if number in own else each
                waits[following] -= 1
                if not waits[following]:
                    heapq.heappush(ready, (-_order(following), len(ready) + len(grads) * 1000, following))
    return leaves


def _order(node: Any) -> int:
    return int(node._sequence_nr()) if not hasattr(node, "variable") else 2**62


def _nodes(first: Any) -> Iterator[Any]:
    seen, stack = {first}, [first]
    while stack:
        node = stack.pop()
        yield node
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        stack += following


def _call(node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs. Functions written in Python give them for all arguments, of which others than
    tensors come first or last."""
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    found = (node.apply if python else node)(*grads)
    found, inputs = found if isinstance(found, tuple) else (found,), len(node.next_functions)
    while python and len(found) > inputs and not node.needs_input_grad[-len(found)]:
        found = found[1:]
    return found[:inputs]


def built(backbone: str, preset: str, size: int, fused: bool = False, **options: Any) -> nn.Module:
    """A network on CUDA, its weights with the channels last."""
    from diffkit.backbones import unet
    from diffkit.interfaces import ImageSpec

    spec, make = ImageSpec(3, size, size), getattr(unet, backbone)
    with torch.device("cuda"):
        network: nn.Module = make(spec, **{**make.presets(preset, spec), **options})
    for module in network.modules():
        if hasattr(module, "fused_kernel"):
            module.fused_kernel = fused
        for name, own in module.named_parameters(recurse=False):  # Module.to cannot change fake ones in place
            if own.dim() == 4:
                setattr(module, name, nn.Parameter(own.detach().to(memory_format=torch.channels_last)))
    return network


def run(way: str, backbone: str, preset: str, size: int) -> nn.Module:
    """A network as one of WAYS runs it."""
    from diffkit.engine.casts import CastTogether

    network = built(backbone, preset, size, fused=way != WAYS[0])
    if way != WAYS[2]:
        return network
    cast = CastTogether(network, network)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast(torch.empty(1, 3, size, size, device="cuda"), torch.empty(1, device="cuda"))
    return cast


def step(network: nn.Module, images: int, size: int, precision: torch.dtype | None = torch.bfloat16) -> Traffic:
    """One forward and backward pass on fake CUDA tensors."""
    x, c_noise = torch.empty(images, 3, size, size, device="cuda"), torch.empty(images, device="cuda")
    autocast = torch.autocast("cuda", dtype=precision) if precision else nullcontext()
    with Traffic() as traffic:
        with autocast:
            result = network(x, c_noise)
        backward(result, torch.empty_like(result))
    return traffic


def figures(traffic: Traffic, images: int) -> dict[str, Any]:
    """Per image, in MB (1e6 bytes); kernels and casts of a step."""
    most = {name: round(count / images / 1e6, 1) for name, count in traffic.bytes.most_common(8)}
    return {
        "MB_beside_convolutions": round(traffic.beside() / images / 1e6, 1),
        "MB_beside_convolutions_two_passes": round((traffic.beside() + traffic.again.total()) / images / 1e6, 1),
        "MB_convolutions": round(sum(traffic.bytes[name] for name in CONVOLUTIONS) / images / 1e6, 1),
        "kernels": traffic.kernels.total(),
        "casts": len(traffic.casts),
        "MB_by_operation": most,
    }


def main() -> None:
    from common import kept, write

    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="base")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--backbone", default="unet")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    for name in WAYS:
        with fake_cuda():
            network = run(name, asked.backbone, asked.preset, asked.size)
            found[name] = figures(step(network, asked.images, asked.size), asked.images)
        print(name, json.dumps(found[name], indent=1))
    case = f"{asked.backbone} {asked.preset} {asked.size}x{asked.size}"
    results = kept("gpu-bytes")
    results.pop("environment", None)
    version = torch.__version__.split("+")[0]
    results[case] = {**results.get(case, {}), "torch": version, "images": asked.images, **found}
    write("gpu-bytes", results)


if __name__ == "__main__":
    main()
