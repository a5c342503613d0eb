"""Seconds and peak memory of `diffkit evaluate`, whole process, with nothing in the cache.

python benchmarks/evaluate.py IMAGES DATA
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write


def own_memory(process: int) -> float:
    """GiB that belong to the process alone; not the image files that it has mapped, which the system can take back."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 2**20


def main() -> None:
    if len(sys.argv) != 3:
        print("Skipped: give the images to be measured and the real ones.")
        return
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "diffkit", "evaluate", sys.argv[1], "--data", sys.argv[2], "--json"]
        times, own = [], 0.0
        for _ in ("cold", "warm"):
            start = time.perf_counter()
            with tempfile.TemporaryFile() as output:
                process = subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=output)
                while process.poll() is None:
                    own = max(own, own_memory(process.pid))
                    time.sleep(0.05)
                times.append(time.perf_counter() - start)
                output.seek(0)
                found = json.loads(output.read())
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{found['samples']:,} against {found['reference']['images']:,}: {times[0]:.0f} s, then {times[1]:.0f} s")
    print(f"peak memory {own:.2f} GiB, {memory:.2f} GiB with the mapped image files and libraries")
    write(
        "evaluate",
        {
            "images": found["samples"],
            "reference": found["reference"]["images"],
            "extractor": found["extractor"],
            "seconds_cold": round(times[0], 1),
            "seconds_with_cached_features": round(times[1], 1),
            "peak_own_memory_gib": round(own, 2),
            "peak_resident_gib": round(memory, 2),
            "figures": found["metrics"],
        },
    )


if __name__ == "__main__":
    main()
