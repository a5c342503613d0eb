"""Noise by one kernel: the plain way's numbers, in Triton's interpreter, and compiled without approximations."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkit.core import random
from diffkit.core.random import Purpose, normal, normals

INTERPRETED = """
import math, torch
from diffkit.core.normal_kernel import launch
from diffkit.core.random import Purpose, bits, normal

positions, intervals = torch.tensor([0, 1, 2**33 + 5, 2**31 + 7]), torch.tensor([0, 5, 2**20, 3])
cases = [(0, 0, 10), (2**61 + 1, 9, 999), (-3, 0, 4096), (-(2**62), 5, 2049), (2**32 + 1, 2**20, 3)]
for seed, interval, count in cases:
    word = int(Purpose.START_NOISE)
    alike = launch(positions, None, seed, word | interval << 8, count)
    each = launch(positions, intervals, seed, word, count)
    for found, numbers in ((alike, interval), (each, intervals)):
        assert found.dtype == torch.float32 and found.shape == (4, count)
        words = bits(seed, Purpose.START_NOISE, positions, count + count % 2, numbers)
        unit = ((words >> 8).float() + 0.5) * 2.0**-24  # the float32 numbers that are transformed
        angle = (unit[:, 1::2] * (2 * math.pi)).double()
        radius = (-2 * unit[:, 0::2].double().log()).sqrt()
        true = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count]
        assert (found - true).abs().max() < 6e-7, (found - true).abs().max()
        plain = normal(seed, Purpose.START_NOISE, positions, (count,), numbers)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    assert torch.equal(launch(positions[2:], intervals[2:], seed, word, count), each[2:])
assert launch(positions[:0], None, 0, 0, 4).shape == (0, 4)
"""


def test_the_kernel_gives_the_numbers_of_the_plain_way_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_kernel_compiles_for_a_gpu_without_approximate_functions() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffkit.core import normal_kernel

    types = {"numbers": "*fp32", "positions": "*i64", "intervals": "*i64", "seed": "i64", "word": "i32"}
    sizes = {"count": "i32", "programs": "i32", "BLOCK": "constexpr"}
    source = ASTSource(normal_kernel._kernel, {**types, **sizes}, constexprs={(7,): normal_kernel.BLOCK})
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    instructions = set(re.findall(r"^\s+(?:@\S+ )?([a-z]\w*(?:\.\w+)+)", made.asm["ptx"], re.MULTILINE))
    assert {"sqrt.rn.f32", "st.global.v4.b32"} & instructions
    assert not [each for each in instructions if "approx" in each or each.startswith(("sin.", "cos.", "lg2."))]


def test_on_a_gpu_the_noise_of_a_step_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from diffkit.core import normal_kernel
    from fake_cuda import Kernels

    monkeypatch.setattr(random, "_kernel", lambda device: normal_kernel.normal)
    with FakeTensorMode():
        positions = torch.arange(8, device="cuda")
        with Kernels() as kernels:
            noise = normal(-1, Purpose.TRAIN_NOISE, positions, (3, 16, 16))
        assert noise.shape == (8, 3, 16, 16) and noise.device.type == "cuda" and noise.dtype == torch.float32
        assert kernels.names == {"normal": 1}
        with Kernels() as kernels:
            several = normals(3, Purpose.BROWNIAN, positions, (3, 16, 16), [1, 2, 5])
        assert kernels.names == {"normal": 3} and len(several) == 3


def test_a_device_without_the_kernel_has_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """None where it cannot be launched, nor where it gives other numbers."""
    normal_kernel = pytest.importorskip("diffkit.core.normal_kernel")
    trial = random._kernel.__wrapped__
    assert trial(torch.device("cpu")) is None  # where there is no such operator

    def plain(positions: Tensor, intervals: Tensor, seed: int, word: int, count: int) -> Tensor:
        return random._transformed(seed, Purpose(word), positions, count, intervals)

    monkeypatch.setattr(normal_kernel, "normal", plain)
    assert trial(torch.device("cpu")) is plain
    monkeypatch.setattr(normal_kernel, "normal", lambda *arguments: plain(*arguments).flip(1))
    assert trial(torch.device("cpu")) is None
