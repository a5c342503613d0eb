"""Where to compute, and in which precision."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from diffkit.engine.functions import fast_functions
from diffkit.engine.turns import turns
from diffkit.errors import DiffkitError, ExitCode

Autocast = Callable[[], AbstractContextManager[object]]
GAIN_WANTED = 1.1
SHORT = 0.5  # seconds
WANT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a memory",  # and these by oneDNN, on a CPU
    "could not create a primitive",
    "could not execute a primitive",
    "out of memory",
    "ALLOC_FAILED",
)
NO_ENGINE = "unable to find an engine"
"""What cuDNN says when it has no way for a convolution, and also when none of its ways gets the memory to work in."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h


def choose_device(name: str) -> torch.device:
    """ "auto" is the first of CUDA, MPS and CPU that is there. Raises DiffkitError if a named one is not.

    Of several processes on one machine each has its own GPU, by torchrun's LOCAL_RANK.
    """
    if torch.cuda.is_available() and name in {"auto", "cuda"} and "LOCAL_RANK" in os.environ:
        return choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DiffkitError(f"No device called '{name}'.", "Choose auto, cpu, cuda, cuda:1 or mps.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise DiffkitError(
            f"This machine has no device '{name}' that torch {torch.__version__} can use.",
            "Try --device auto or --device cpu.",
            code=ExitCode.MACHINE,
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and graphs are those of the current one
    return device


def autocast(device: torch.device, precision: str) -> Autocast:
    """What the network runs under: bfloat16 autocast, or nothing. Master weights are float32 either way."""
    if precision == "bfloat16":
        return partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return nullcontext


def choose_precision(wanted: str, device: torch.device, forward: Callable[[], Tensor]) -> str:
    """ "bfloat16" or "float32": what was asked for, or what is faster here.

    On CUDA, bfloat16 where the hardware has it. On a CPU `forward` (one small batch) is timed in both, since bfloat16
    gains a factor of two with AVX512-BF16 or AMX and loses more than that without. Raises DiffkitError if the device
    lacks what was asked for.
    """
    if wanted != "auto":
        check_precision(wanted, device)
        return wanted
    if device.type == "cuda":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if device.type != "cpu":
        return "float32"
    full, half = _seconds(forward, [autocast(device, "float32"), autocast(device, "bfloat16")], device)
    return "bfloat16" if half * GAIN_WANTED < full else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself. Others emulate matrix products, and have no convolutions."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises DiffkitError if there is no such precision, or if the device cannot compute in it; slowly will do."""
    if precision not in ("float32", "bfloat16"):
        raise DiffkitError(f"No precision called '{precision}'.", "Choose auto, float32 or bfloat16.")
    if precision == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise DiffkitError(
            f"{describe(device)} has no bfloat16: its compute capability is {major}.{minor}, and 8.0 is needed.",
            "Give --precision float32, or leave it out.",
            code=ExitCode.MACHINE,
        )
    if precision == "bfloat16":
        try:
            a = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
            a @ a
        except (RuntimeError, TypeError) as error:
            raise DiffkitError(
                f"{describe(device)} has no bfloat16 ({error}).",
                "Give --precision float32.",
                code=ExitCode.MACHINE,
            ) from error


def _seconds(forward: Callable[[], Tensor], contexts: Sequence[Autocast], device: torch.device) -> list[float]:
    """The fastest step under each context. They take turns, so that what else runs meanwhile slows all of them.

    Three turns after one that warms up; up to eight while they are short, when one is easily disturbed.
    """
    times: list[list[float]] = [[] for _ in contexts]
    with turns(device) as turn:
        while len(times[0]) < 4 or (len(times[0]) < 9 and sum(map(sum, times)) < SHORT):
            turn.take()
            for context, own in zip(contexts, times, strict=True):
                start = time.perf_counter()
                with fast_functions(device):  # as the training will
                    with context():
                        result = forward().float().square().mean()
                    result.backward()
                own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]


def activation_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass; `forward` may run on the meta device."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def memory_bytes(device: torch.device) -> int | None:
    """Free memory of the device, with what torch only keeps; None where not known or not what limits (CPU)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return None


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that anything may take, after what torch only keeps has been given back; else None."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def is_memory(error: BaseException) -> bool:
    """Whether there was too little memory. On a CPU, and in cuDNN, torch raises a plain RuntimeError for that."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return any(words in said for words in WANT_OF_MEMORY) or (NO_ENGINE in said and _has_run_out())


def _has_run_out() -> bool:
    """Whether torch has ever failed to get memory of a GPU in this process; cuDNN hides that."""
    if not torch.cuda.is_initialized():
        return False
    return any(torch.cuda.memory_stats(each).get("num_ooms", 0) for each in range(torch.cuda.device_count()))


def release_memory() -> None:
    """After a want of memory: give back what is only kept, and what the error itself still referred to.

    Not to be called where that error is being handled: it holds the frames it came from.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Have `memory_used` of a GPU begin anew: what a trial held does not count."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def choose_kernels(device: torch.device, exact: bool) -> None:
    """Have cuDNN find the fastest kernel for each shape of a convolution by trying all, for a training in this process.

    Which one that is may differ from process to process, and the rounding with it. So not where `exact`, or where the
    user wants torch to be deterministic; and never for sampling, where the same command makes the same images.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not exact and not torch.are_deterministic_algorithms_enabled()


def first_line(error: BaseException) -> str:
    """What went wrong, shortly."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for this process: on a CPU each step frees what the next one needs.

    Otherwise it goes back to the system, and comes again page by page, cleared: up to a tenth of a small network's
    step. Does nothing where the library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, 2**25)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def machine_memory() -> int | None:
    """Bytes of the machine's own memory; None where not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def memory_used(device: torch.device) -> int | None:
    """The most memory held so far: of the device, or of the process on a CPU (None where not known).

    Of a GPU, since `forget_peak`.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> str:
    """ "cuda (NVIDIA H200)" or "cpu (8 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return str(device)
