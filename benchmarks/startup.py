"""How long the command line takes to start, beside an empty Typer app, in turns: seconds, whole process."""

from __future__ import annotations

import subprocess
import sys
import time

from common import spread, write

EMPTY = """
import typer
app = typer.Typer()
@app.command()
def nothing(name: str = "x"):
    "Nothing."
@app.command()
def more(name: str = "x"):
    "Nothing more."
app()
"""
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "empty typer app --help": [sys.executable, "-c", EMPTY, "--help"],
    "diffkit --help": [sys.executable, "-m", "diffkit", "--help"],
    "diffkit --version": [sys.executable, "-m", "diffkit", "--version"],
    "diffkit plugins list": [sys.executable, "-m", "diffkit", "plugins", "list"],
}
ROUNDS = 15


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    figures = {name: spread(runs[1:]) for name, runs in seconds.items()}
    for name, figure in figures.items():
        over = figure["median"] - figures["empty typer app --help"]["median"]
        print(f"{name:26} {figure['median']:.3f} s  ({figure['min']:.3f} to {figure['max']:.3f})  {over:+.3f}")
    write("startup", {"rounds": ROUNDS, "seconds": figures})


if __name__ == "__main__":
    main()
