"""What of the machine this process may use, and how OpenMP's threads are to share it. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

SPINS = "3000"
CGROUPS = Path("/sys/fs/cgroup")
MEMINFO, OWN_GROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")
_from_outside = frozenset(os.environ)


def processors() -> int:
    """The number of processors that this process may keep busy: those it may run on, or what its control group grants.

    Only control groups of version 2 are read.
    """
    quotas = [_numbers(group / "cpu.max") for group in _groups()]
    granted = [math.ceil(quota[0] / quota[1]) for quota in quotas if len(quota) == 2]
    return max(1, min([_allowed(), *granted]))


def free_memory() -> int | None:
    """Bytes that new processes may take without swapping; None where that is not known."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None
    for group in _groups():
        limit, used = _numbers(group / "memory.max"), _numbers(group / "memory.current")
        if limit and used:
            free = min(free, max(0, limit[0] - used[0]))
    return free


def set_up_openmp() -> None:
    """Let OpenMP's threads wait briefly, and start no more of them than may run. Works before torch is imported.

    By default a thread that waits for the others keeps its processor for milliseconds. Beside other programs it then
    holds up the very threads that it waits for. Variables that the user has set are left as they are.
    """
    if "OMP_WAIT_POLICY" not in _from_outside:
        set_default("GOMP_SPINCOUNT", SPINS)
    if processors() < _allowed():
        set_default("OMP_NUM_THREADS", str(processors()))


def set_default(name: str, value: str) -> None:
    """Set an environment variable, unless it was set when this process began."""
    if name not in _from_outside:
        os.environ[name] = value


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups() -> list[Path]:
    """The folders of this process's control group and of those around it."""
    try:
        lines = OWN_GROUP.read_text().splitlines()
    except OSError:
        return []
    inner = next((CGROUPS / line[3:].strip("/") for line in lines if line.startswith("0::")), CGROUPS)
    return [group for group in (inner, *inner.parents) if group.is_relative_to(CGROUPS)]


def _numbers(file: Path) -> tuple[int, ...]:
    """The numbers in a control group's file; none where it is absent or sets no limit."""
    try:
        words = file.read_text().split()
    except OSError:
        return ()
    return tuple(map(int, words)) if all(word.isdecimal() for word in words) else ()
