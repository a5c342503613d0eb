"""The command line: thin commands; whatever is heavy is imported inside their bodies. Rich lives only here."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from diffkit import __version__
from diffkit.errors import DiffkitError, ExitCode

app = typer.Typer(
    name="diffkit",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a folder of images to a diffusion model that makes more of them.",
    epilog="Start with: [bold]diffkit demo[/bold], or [bold]diffkit prepare PHOTOS[/bold].",
)


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


def _add_commands() -> None:
    from diffkit.cli.compare import compare
    from diffkit.cli.demo import demo
    from diffkit.cli.edit import interpolate, invert, trajectory
    from diffkit.cli.ema import ema
    from diffkit.cli.evaluate import evaluate
    from diffkit.cli.plan import plan
    from diffkit.cli.plugins import plugins
    from diffkit.cli.prepare import prepare
    from diffkit.cli.report import report
    from diffkit.cli.sample import sample
    from diffkit.cli.show import show
    from diffkit.cli.train import train

    app.command()(prepare)
    app.command()(plan)
    app.command()(train)
    app.command()(sample)
    app.command()(invert)
    app.command()(interpolate)
    app.command()(trajectory)
    app.command()(evaluate)
    app.command()(compare)
    app.command()(ema)
    app.command()(report)
    app.command()(show)
    app.add_typer(plugins, name="plugins")
    app.command()(demo)


_add_commands()


def main() -> None:
    """Run the command line; errors become a few lines on standard error and an exit code."""
    # Like Ctrl-C, so that what is half done is cleaned up. (Training has its own way.)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from diffkit.cli.launch import leave, watch_launcher
    from diffkit.engine.processors import set_up_openmp

    set_up_openmp()
    watch_launcher()
    code = int(ExitCode.BUG)
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        raise
    except DiffkitError as error:
        code = int(error.code)
        _explain(error)
        sys.exit(code)
    except KeyboardInterrupt:
        code = int(ExitCode.INTERRUPTED)
        if os.environ.get("RANK", "0") == "0":
            print("Interrupted.", file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        _explain_bug(error)
        sys.exit(code)
    finally:
        leave(code)


def _explain(error: DiffkitError) -> None:
    from diffkit.cli.console import err, plain

    if error.silent:
        return
    # What is wrong with the command, or with the data, the first of several processes says for all.
    common = error.code in {ExitCode.USAGE, ExitCode.DATA}
    err.quiet = err.quiet and common and not error.personal
    if _debugging():
        err.print_exception()
    err.print("[bold red]Error:[/] " + plain(error.message), highlight=False)
    if error.hint:
        err.print(plain(error.hint), highlight=False)


def _explain_bug(error: Exception) -> None:
    from diffkit.cli.console import err, plain

    if getattr(error, "silent", False):
        return
    err.quiet = False
    if _debugging():
        err.print_exception()
        return
    err.print(f"[bold red]Bug:[/] {type(error).__name__}: " + plain(str(error)), highlight=False)
    err.print("This should not happen. Please report it with what [bold]diffkit --debug ...[/] prints.")


def _debugging() -> bool:
    return os.environ.get("DIFFKIT_DEBUG", "") not in {"", "0"}
