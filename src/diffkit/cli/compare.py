"""`diffkit compare`: which sampler, how many steps, how much guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit.cli.options import (
    MOST_STEPS,
    PART,
    Against,
    AsJson,
    Count,
    Data,
    Device,
    Extractor,
    Metric,
    Precision,
    Seed,
)

if TYPE_CHECKING:
    from diffkit.measure.estimate import Estimate
    from diffkit.measure.tradeoff import Candidate

WAYS = "What is compared (each may be given several times)"
STEPS = (5, 10, 20, 40)
SAMPLERS = ("euler", "heun", "dpmpp-2m", "deis")
COUNT = 256


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs or models.")],
    sampler: Annotated[
        list[str] | None,
        typer.Option(metavar=PART, help="By default euler, heun, dpmpp-2m, deis.", rich_help_panel=WAYS),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST_STEPS, help="By default 5, 10, 20, 40.", rich_help_panel=WAYS)
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="By default the model's own.", rich_help_panel=WAYS)
    ] = None,
    scheduler: Annotated[list[str] | None, typer.Option(metavar=PART, rich_help_panel=WAYS)] = None,
    data: Data = None,
    against: Against = "all",
    metric: Metric = "kid",
    extractor: Extractor = "lite0",
    count: Count = COUNT,
    seed: Seed = 0,
    save: Annotated[bool, typer.Option("--save", help="Keep each run's best choice as its sampling defaults.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for compare.json and compare.png.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure ways of sampling side by side: distance to the real images, network calls, seconds.

    The choice is the one with the fewest network calls whose distance lies within the best one's interval.
    """
    from diffkit.cli.console import chosen_among, drawn, plain, require_vacant, say
    from diffkit.compose import load_model
    from diffkit.compose.comparison import compare as compared
    from diffkit.compose.comparison import real_against_real, ways
    from diffkit.compose.reference import AGAINST, Reference
    from diffkit.measure.scores import METRICS

    chosen_among("--against", against, AGAINST)
    chosen_among("--metric", metric, METRICS)
    if out is not None:
        require_vacant(out)
    models = [({"run": str(path)}, load_model(path, device=device, precision=precision)) for path in runs]
    reference = Reference.of(models[0][1], data, extractor)
    asked = ways(models, sampler or SAMPLERS, scheduler or [None], steps or STEPS, guidance or [None])
    found = drawn(compared(reference, against, metric, asked, count, seed))
    chosen = _chosen(found)
    record = {
        "data": str(reference.path),
        "note": reference.note,
        "against": against,
        "extractor": str(reference.choice),
        "seed": seed,
        "candidates": [each.to_dict() for each in found],
        "choice": [each.to_dict() for each in chosen],
    }
    _report(record, found, chosen, real_against_real(reference, against, metric, count), out, as_json)
    if reference.note:
        say(f"[yellow]{plain(reference.note)}[/]")
    if save:
        _save(chosen)


def _chosen(found: Sequence[Candidate]) -> list[Candidate]:
    """The choice of each run."""
    from diffkit.measure.tradeoff import choice

    runs = dict.fromkeys(each.settings["run"] for each in found)
    return [choice([each for each in found if each.settings["run"] == run]) for run in runs]


def _report(
    record: dict[str, Any],
    found: Sequence[Candidate],
    chosen: Sequence[Candidate],
    floor: Estimate | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Print the table or the JSON; then write the JSON and the plot where a folder is given."""
    from diffkit import durable
    from diffkit.cli.console import plain, print_json, say
    from diffkit.measure.tradeoff import plot

    record["floor"] = None if floor is None else floor.to_dict()
    if as_json:
        print_json(record)
    else:
        _table(found, chosen, floor)
    if out is not None:
        durable.make_folders(out)
        durable.write_json(out / "compare.json", record)
        durable.write_bytes(out / "compare.png", plot(found, _labels(found), chosen, floor))
        say(f"Written to [bold]{plain(str(out))}[/].")


def _labels(found: Sequence[Candidate]) -> list[str]:
    """What tells a line of the plot from the others, steps apart."""
    keys = _different(found, without=("steps",)) or ["sampler"]
    return ["  ".join(f"{each.settings[key]}" for key in keys) for each in found]


def _different(found: Sequence[Candidate], without: Sequence[str] = ()) -> list[str]:
    """The settings in which the candidates differ."""
    keys = dict.fromkeys(key for each in found for key in each.settings)
    return [key for key in keys if key not in without and len({str(each.settings.get(key)) for each in found}) > 1]


def _table(found: Sequence[Candidate], chosen: Sequence[Candidate], floor: Estimate | None) -> None:
    from rich.table import Table

    from diffkit.cli.console import clock, figure, interval, out, plain, say
    from diffkit.measure.tradeoff import front

    keys = _different(found) or ["sampler", "steps"]
    best = {id(each) for each in front(found)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in keys:
        table.add_column(key, overflow="fold", justify="right" if key in {"steps", "guidance"} else "left")
    for name in (found[0].metric.name, "95 % interval", "calls", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for each in found:
        mark = "best for its calls" if id(each) in best else ""
        mark = "[yellow]burnt: too much black and white[/]" if each.burnt else mark
        mark = "[bold green]choice[/]" if each in chosen else mark
        cells = [plain(str(each.settings.get(key, ""))) for key in keys]
        figures = [figure(each.metric.value), interval(each.metric), str(each.calls), clock(each.seconds)]
        table.add_row(*cells, *figures, mark)
    out.print(table)
    if floor is not None:
        say(f"Real against real, as many images: {figure(floor.value)} ({interval(floor)})")


def _save(chosen: Sequence[Candidate]) -> None:
    """Into each run's defaults.toml, beside whatever else it says."""
    import tomli_w

    from diffkit import durable, paths
    from diffkit.cli.console import plain, say
    from diffkit.compose import model_path
    from diffkit.config import PartChoice, read_toml

    for each in chosen:
        path = model_path(each.settings["run"]).parent / "defaults.toml"
        tables = read_toml(path) if paths.exists(path) else {}
        settings = each.settings
        sample = {key: PartChoice.model_validate(settings[key]).table() for key in ("sampler", "scheduler")}
        sample |= {"steps": settings["steps"], "guidance": settings["guidance"]}
        durable.write_text(path, tomli_w.dumps({**tables, "sample": {**tables.get("sample", {}), **sample}}))
        say(f"Defaults of [bold]{plain(settings['run'])}[/]: {plain(settings['sampler'])}, {settings['steps']} steps")
