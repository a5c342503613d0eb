"""`diffkit selftest`: faults on purpose, on the user's own disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffkit.cli.options import AsJson

if TYPE_CHECKING:
    from diffkit.selftest import Result

SHOWN = 3


def selftest(
    folder: Annotated[
        Path, typer.Argument(help="Where: a folder on the disk to try. All is done in a new folder inside it.")
    ] = Path(),
    time: Annotated[str, typer.Option(metavar="DURATION", help="How long, about.")] = "2m",
    row: Annotated[list[int] | None, typer.Option("--row", help="Only this row; can be given several times.")] = None,
    as_json: AsJson = False,
) -> None:
    """Kill, interrupt, damage and starve diffkit on this disk, and see whether anything is lost.

    Small trainings are killed at random and at every write; files, images and settings are damaged, disks are full.
    Power cuts are tried in a model. Nothing outside a temporary folder is touched.
    """
    import dataclasses

    from rich.table import Table

    from diffkit.cli.console import clock, duration, out, plain, print_json, progress, say
    from diffkit.errors import DiffkitError, ExitCode
    from diffkit.selftest import scorecard, selftest

    if not folder.is_dir():
        raise DiffkitError(f"There is no folder {folder}.", "Name one on the disk to try.")
    known = {each.number: each for each in scorecard()}
    if unknown := set(row or ()) - known.keys():
        raise DiffkitError(f"There is no row {min(unknown)}.", f"Rows: {', '.join(map(str, known))}.")
    results: list[Result] = []
    with progress() as bar:
        task = bar.add_task("Trying", total=len(row or known))
        for result in selftest(folder, numbers=row or None, seconds=duration(time)):
            results.append(result)
            bar.update(task, advance=1, description=plain(result.title))
    wrong = [result for result in results if result.wrong]
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        table = Table("row", "what was tried", "trials", "wrong", "time", box=None, pad_edge=False, header_style="bold")
        for result in results:
            verdict = f"[bold red]{len(result.wrong)}[/]" if result.wrong else "[green]0[/]"
            if result.untestable:
                verdict = "-"
            title = plain(f"{result.title} ({result.untestable})" if result.untestable else result.title)
            table.add_row(str(result.number), title, f"{result.trials:,}", verdict, clock(result.seconds))
        out.print(table)
        for result in wrong:
            for text in result.wrong[:SHOWN]:
                say(f"[bold red]{result.number}[/] {plain(text)}")
    if wrong:
        raise typer.Exit(int(ExitCode.BUG))
    say(f"[green]{sum(result.trials for result in results):,} trials, none wrong.[/]")
