"""GroupNorm as torch computes it and as Triton's kernels do: in the interpreter, and compiled for a GPU without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffkit.backbones.norm import GroupNorm, can_fuse

triton_is_here = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@triton_is_here
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton has to know before it is imported, which other tests may have done."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_norm.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_without_a_gpu_the_operations_are_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    x, modulation = torch.randn(2, 24, 5, 3), torch.randn(2, 48)
    for silu, given in ((True, modulation), (True, None), (False, None)):
        layer = GroupNorm(24, silu=silu)
        assert layer.num_groups == 6
        wanted = F.group_norm(x, 6, layer.weight, layer.bias)
        if given is not None:
            wanted = wanted * (1 + given[:, :24, None, None]) + given[:, 24:, None, None]
        wanted = F.silu(wanted) if silu else wanted
        for fused in (False, True):
            layer.fused_kernel = fused
            assert torch.equal(layer(x, given), wanted)


def test_what_the_kernels_cannot_take_they_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkit.backbones.norm.INTERPRETED", True)
    monkeypatch.setattr("diffkit.backbones.norm.HAS_TRITON", True)
    x = torch.zeros(2, 8, 4, 4)
    assert can_fuse(x) and can_fuse(x.bfloat16()) and can_fuse(x[:, :, ::2])
    assert not can_fuse(x.double()) and not can_fuse(x[0]) and not can_fuse(x[:0])
    assert not can_fuse(torch.empty(1, device="meta").expand(1, 2**11, 2**10, 2**10))
    monkeypatch.setattr("diffkit.backbones.norm.HAS_TRITON", False)
    assert not can_fuse(x)


# What the kernels are called with on a GPU in bfloat16, and the alignment that Triton finds in it.
IMAGES = ("x", "y", "grad_y", "grad_x", "modulation", "grad_modulation")
POINTERS = (*IMAGES, "part", "weight", "bias", "statistics", "factors", "means", "grad_affine")
ALIGNED = {*POINTERS, "x_stride", "s_position", "s_channel", "positions", "channels", "half"}


def assembly(kernel: Any, constants: dict[str, Any]) -> str:
    """The kernel for an H100, in PTX; raises if the assembler refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in POINTERS:
            return "*bf16" if name in IMAGES else "*fp32"
        return "fp32" if name == "eps" else "i32"

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name in ALIGNED - set(constants)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return str(compiled.asm["ptx"])


@triton_is_here
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("last", [False, True])
def test_images_are_read_and_written_in_wide_words(last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffkit.backbones import norm_kernels, norm_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layout = torch.channels_last if last else torch.contiguous_format
    tiles = norm_launch.Tiles.of(torch.empty(1, 128, 64, 64, device="meta").to(memory_format=layout))
    constants = {**tiles.shape, "SILU": True, **{name: 1 for name, step in tiles.strides.items() if step == 1}}
    assert tiles.P * tiles.C == norm_launch.TILE
    code = assembly(norm_kernels.apply_backward, constants)
    # 4,096 numbers of two tensors in 16 bytes at a time by 128 threads: eight loads, and four stores.
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", code)) >= 8
    assert len(re.findall(r"st\.global[\w.:]*\.v4\.b32", code)) == 4
    assert "local" not in code  # no memory for registers that do not fit


@triton_is_here
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffkit.backbones import norm_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"P": 64, "C": 64, "T": 64, "D": 8, "SILU": True, "MODULATED": True, "s_channel": 1}
    for name in ("moments", "factors", "apply", "sums", "small_gradients"):
        assert ".visible .entry" in assembly(getattr(norm_kernels, name), constants)
