"""`diffkit plugins`: which parts there are, what each takes, whether it keeps its contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit.cli.options import AsJson

if TYPE_CHECKING:
    from diffkit.registry import Part

plugins = typer.Typer(no_args_is_help=True, help="Parts: schedulers, samplers, backbones and the other kinds.")
ALIASES = {"schedulers": "schedules", "sources": "datasets", "dataset": "datasets", "schedule": "schedules"}


@plugins.command("list")
def list_parts(
    kind: Annotated[
        str | None, typer.Argument(help="schedulers, samplers, tasks, ...: the kinds that are listed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the parts that are installed, and the plugins that could not be loaded."""
    from diffkit.cli.console import out, plain, print_json, say
    from diffkit.registry import registry

    parts = registry().parts(_kind(kind))
    skipped = registry().skipped
    if as_json:
        print_json({"parts": [_record(part) for part in parts], "skipped": [vars(each) for each in skipped]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", expand=out.file.isatty())
    table.add_column("kind", no_wrap=True)
    table.add_column("name", style="green", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", ratio=1)
    last = ""
    for part in parts:
        origin = "built in" if part.builtin else f"{part.distribution} {part.version}"
        table.add_row("" if part.kind == last else _word(part), part.name, plain(origin), plain(part.summary))
        last = part.kind
    out.print(table)
    for each in skipped:
        say(f"[yellow]Skipped: {plain(str(each))}[/]")


@plugins.command()
def show(name: Annotated[str, typer.Argument(help="A part, such as karras or plugin/name.")]) -> None:
    """Show what a part is and its options."""
    import inspect

    from rich.table import Table

    from diffkit.cli.console import out, plain
    from diffkit.config import options_of

    for part in _named(name):
        text = inspect.getdoc(part.function) or "(no description)"
        out.print(f"[bold green]{plain(part.name)}[/]  {_word(part)}  {plain(part.distribution)} {plain(part.version)}")
        out.print(f"{plain(part.where)}\n", highlight=False)
        out.print(plain(text) + "\n", highlight=False)
        options = options_of(part.function)
        if not options:
            out.print("It has no options.\n")
            continue
        table = Table("option", "type", "default", box=None, pad_edge=False, header_style="bold")
        for option in options.values():
            required = option.default is inspect.Parameter.empty
            kind = "" if option.annotation is inspect.Parameter.empty else str(option.annotation)
            default = "from the data" if required else str(option.default)
            table.add_row(f"[green]{plain(option.name)}[/]", plain(kind), plain(default))
        out.print(table, "")


@plugins.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Parts to check; by default all that are not built in.")
    ] = None,
    path: Annotated[str | None, typer.Option(help="For a dataset source: what it is to read.")] = None,
) -> None:
    """Check that parts keep their contract (the checks of diffkit.testing)."""
    from diffkit.cli.console import plain, say
    from diffkit.errors import DiffkitError
    from diffkit.registry import registry

    if names:
        parts = [part for name in names for part in _named(name)]
    else:
        parts = [part for part in registry().parts() if not part.builtin]
        for each in registry().skipped:
            say(f"[red]failed[/]  {plain(str(each))}")
        if not parts and not registry().skipped:
            say("No plugins are installed.")
    failed = len(registry().skipped) if not names else 0
    for part in parts:
        verdict = _verdict(part, path)
        failed += verdict.startswith("[red]")
        say(f"{verdict}  {_word(part)} {plain(part.name)}")
    if failed:
        raise DiffkitError(f"{failed} failed.", "The contracts are in docs/plugins.md.")


def _verdict(part: Part, path: str | None) -> str:
    from diffkit import testing
    from diffkit.cli.console import plain

    checks: dict[str, Any] = {
        "schedules": testing.check_schedule,
        "predictions": testing.check_prediction,
        "weightings": testing.check_weighting,
        "samplers": testing.check_sampler,
        "tasks": testing.check_task,
        "backbones": testing.check_backbone,
        "extractors": testing.check_extractor,
        "trackers": testing.check_tracker,
    }
    if part.kind == "datasets" and path is None:
        return "[yellow]skipped[/] (needs --path)"
    try:
        if part.kind == "datasets":
            testing.check_dataset(part.function, str(path))
        else:
            checks[part.kind](part.function)
    except Exception as error:
        return f"[red]failed[/]  {plain(type(error).__name__ + ': ' + str(error))}:"
    return "[green]passed[/]"


def _named(name: str) -> list[Part]:
    """Every part of that name, of whatever kind. Raises DiffkitError if there is none."""
    from diffkit.errors import DiffkitError, did_you_mean
    from diffkit.registry import KINDS, registry

    known = {part.name for part in registry().parts()}
    found = [part for kind in KINDS for part in registry().matching(kind, name)]
    if not found:
        raise DiffkitError(f"No part called '{name}'.", f"{did_you_mean(name, known)}See: diffkit plugins list.")
    return found


def _kind(text: str | None) -> str | None:
    from diffkit.errors import DiffkitError, did_you_mean
    from diffkit.registry import KINDS

    if text is None:
        return None
    kind = ALIASES.get(text, text if text.endswith("s") else text + "s")
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        known = ["schedulers", *KINDS[1:]]
        raise DiffkitError(
            f"No kind of part called '{text}'.", f"{did_you_mean(text, known)}Known: {', '.join(known)}."
        )
    return kind


def _record(part: Part) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "name": part.name,
        "plugin": part.plugin,
        "distribution": part.distribution,
        "version": part.version,
        "target": part.where,
        "summary": part.summary,
    }


def _word(part: Part) -> str:
    from diffkit.registry import word

    return word(part.kind)
