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

from common import write


def main() -> None:
    if len(sys.argv) != 3:
        print("Skipped: give the images to be measured and the real ones.")
        return
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "diffkit", "evaluate", sys.argv[1], "--data", sys.argv[2], "--json"]
        times = []
        for _ in ("cold", "warm"):
            start = time.perf_counter()
            done = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": cache}, capture_output=True, check=True)
            times.append(time.perf_counter() - start)
    found = json.loads(done.stdout)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{found['samples']:,} against {found['reference']['images']:,}: {times[0]:.0f} s, then {times[1]:.0f} s")
    print(f"peak memory {memory:.2f} GiB")
    write(
        "evaluate",
        {
            "images": found["samples"],
            "reference": found["reference"]["images"],
            "extractor": found["extractor"],
            "seconds_cold": round(times[0], 1),
            "seconds_with_cached_features": round(times[1], 1),
            "peak_memory_gib": round(memory, 2),
            "figures": found["metrics"],
        },
    )


if __name__ == "__main__":
    main()
