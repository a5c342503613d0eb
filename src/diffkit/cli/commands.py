"""The commands, gathered under one name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffkit import __version__, durable
from diffkit.cli.compare import compare
from diffkit.cli.console import say
from diffkit.cli.demo import demo
from diffkit.cli.edit import interpolate, invert, trajectory
from diffkit.cli.ema import ema
from diffkit.cli.evaluate import evaluate
from diffkit.cli.plan import plan
from diffkit.cli.plugins import plugins
from diffkit.cli.prepare import prepare
from diffkit.cli.report import report
from diffkit.cli.sample import sample
from diffkit.cli.selftest import selftest
from diffkit.cli.show import show
from diffkit.cli.train import train
from diffkit.errors import DiffkitError, ExitCode


class Failed(Exception):
    """What a command has raised (`__cause__`), out of the reach of Typer, which has exit codes of its own for it."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError, OSError) as error:
            raise Failed from error


app = typer.Typer(
    name="diffkit",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a folder of images to a diffusion model that makes more of them.",
    epilog="Start with: [bold]diffkit demo[/bold], or [bold]diffkit prepare PHOTOS[/bold].",
)
for command in (
    prepare, plan, train, sample, invert, interpolate, trajectory, evaluate, compare, ema, report, show, selftest, demo
):  # fmt: skip
    app.command()(command)
app.add_typer(plugins, name="plugins")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"diffkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Use built-in parts only.")] = False,
) -> None:
    if debug:
        os.environ["DIFFKIT_DEBUG"] = "1"
    if no_plugins:
        from diffkit.registry import disable_plugins

        disable_plugins()


def run(arguments: Sequence[str]) -> None:
    """Run the command of these arguments. Raises what it raises; SystemExit for its exit code and wrong usage."""
    _check(arguments)
    # That it has no cache is nothing that a user of diffkit could mend.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        app(arguments)
    except Failed as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    finally:
        if durable.process_folder.cache_info().currsize:
            say(
                "[yellow]The cache, ~/.cache/diffkit, cannot be written: what it would keep is made again each time.[/]"
            )


def _check(arguments: Sequence[str]) -> None:
    """Raises DiffkitError for an empty argument, which would mean the current folder, and for one that is not UTF-8.

    Also where the current folder has been deleted: libraries end the process there.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise DiffkitError("The current folder is gone.", "Change to another: cd ~", code=ExitCode.MACHINE) from error
    for number, argument in enumerate(arguments):
        if not argument:
            after = f" after {arguments[number - 1]}" if number else ""
            raise DiffkitError(f"There is an empty argument{after}.", "Is it a shell variable that is not set?")
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise DiffkitError(
                f"The argument {argument} is not UTF-8, and diffkit keeps records as UTF-8.",
                "Rename the file or folder, or give it a second name: ln -s OLD NEW.",
            ) from error
