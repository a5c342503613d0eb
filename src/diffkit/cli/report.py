"""`diffkit report`: everything about a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, finished or still being trained.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Where; by default RUN/report.html.")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory/--no-trajectory", help="Show images on their way from noise.")
    ] = True,
) -> None:
    """Write one HTML page about a run: curves, samples over time, measurements, how to do it again.

    It needs no network, and can be made again at any time, also while the run is being trained.
    """
    from diffkit import durable, paths
    from diffkit.cli.console import make_parent, plain, say
    from diffkit.compose.report import mine
    from diffkit.compose.report import report as made
    from diffkit.errors import DiffkitError
    from diffkit.names import bytes_text
    from diffkit.rundir import RunDir

    target = out or run / "report.html"
    if paths.exists(target) and not (paths.is_file(target) and mine(target)):
        raise DiffkitError(f"{target} already exists and is not a report.", "Choose another place with -o.")
    text = made(RunDir(run), trajectory=trajectory)
    make_parent(target)
    durable.write_text(target, text)
    say(f"[bold]{plain(str(target))}[/] ({bytes_text(len(text))}): open it in a browser.")
