"""`diffkit show`: what a data set, a run or a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit import paths
from diffkit.cli.options import AsJson

if TYPE_CHECKING:
    from diffkit.config import Settings
    from diffkit.engine.anatomy import StageFacts
    from diffkit.interfaces import ImageSpec


def show(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_DATA_OR_MODEL")],
    verify: Annotated[bool, typer.Option("--verify", help="Also check every checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a data set holds, or what a model is made of."""
    if paths.exists(path / "dataset.json"):
        _show_data(path, verify, as_json)
    else:
        _show_model(path, verify, as_json)


def _show_data(path: Path, verify: bool, as_json: bool) -> None:
    from diffkit.cli.console import count_text, out, plain, print_json, say
    from diffkit.engine.store import Store
    from diffkit.errors import DiffkitError, ExitCode

    store = Store.open(path, verify=False)
    spec = store.spec
    if as_json:
        print_json(
            {
                "spec": spec.to_dict(),
                "images": store.count,
                "holdout": store.holdout_count,
                "mean": list(store.mean),
                "std": list(store.std),
                "sigma_data": store.sigma_data,
                "classes": store.class_counts,
                "fingerprint": store.fingerprint,
            }
        )
    else:
        out.print(f"[bold]{plain(str(path))}[/]: {store.count:,} images {spec.height}x{spec.width}x{spec.channels}")
        out.print(
            f"held out {store.holdout_count:,}, sigma_data {store.sigma_data:.4f}, fingerprint {store.fingerprint[:12]}"
        )
        for name, count in store.class_counts.items():
            out.print(f"  {plain(name)}  {count:,}", highlight=False)
        for attribute in spec.attributes:
            out.print(f"  {plain(attribute.name)}  {attribute.low:g} to {attribute.high:g}", highlight=False)
        if spec.image_channels:
            out.print("  each with a paired input", highlight=False)
    if verify:
        problems = store.verify()
        if problems:
            hint = f"{count_text(len(problems), 'file')} damaged: prepare the data again."
            raise DiffkitError(problems[0], hint, code=ExitCode.DATA)
        say("[green]All checksums are right.[/]")


def _show_model(path: Path, verify: bool, as_json: bool) -> None:
    from diffkit.cli.console import out, plain, print_json, say
    from diffkit.compose import model_path
    from diffkit.compose.parts import chosen_parts
    from diffkit.config import to_tables, validated
    from diffkit.engine.modelfile import read_model, read_model_header
    from diffkit.interfaces import ImageSpec

    file = model_path(path)
    header = read_model(file)[1] if verify else read_model_header(file)
    settings, spec = validated(header["settings"], str(file)), ImageSpec.from_dict(header["spec"])
    stages = _stages(settings, spec)
    if as_json:
        tables = {"spec": spec.to_dict(), "settings": to_tables(settings), "images_seen": header["images_seen"]}
        print_json({**tables, "sha256": header["sha256"], "stages": [vars(stage) for stage in stages]})
        return
    out.print(f"[bold]{plain(str(file))}[/]: {spec}, {header['images_seen']:,} images seen")
    for name in chosen_parts(settings):
        who = settings.parts.get(name, {})
        origin = f"  ({who['distribution']} {who['version']})" if who else ""
        out.print(f"{name:11}{plain(str(getattr(settings, name)))}{plain(origin)}", highlight=False)
    noise = settings.noise
    out.print(f"{'noise':11}s from {noise.s_min:g} to {noise.s_max:g}, shift {noise.shift:g}", highlight=False)
    _print_table(stages)
    if spec.classes:
        out.print(f"classes    {plain(', '.join(spec.classes[:20]))}{' ...' if len(spec.classes) > 20 else ''}")
    for attribute in spec.attributes:
        out.print(f"attribute  {plain(attribute.name)}, {attribute.low:g} to {attribute.high:g}", highlight=False)
    if verify:
        say("[green]The checksum is right.[/]")


def _stages(settings: Settings, spec: ImageSpec) -> list[StageFacts]:
    from diffkit.compose.parts import trial_network
    from diffkit.engine.anatomy import anatomy

    return anatomy(*trial_network(settings, spec))


def _print_table(stages: list[StageFacts]) -> None:
    from rich.table import Table

    from diffkit.cli.console import out, plain

    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    columns: list[tuple[str, Any, Any]] = [
        ("stage", "left", "total"),
        ("resolution", "right", ""),
        ("channels", "right", ""),
        ("blocks", "right", str(sum(stage.blocks for stage in stages))),
        ("attention", "center", ""),
        ("parameters", "right", f"{sum(stage.parameters for stage in stages):,}"),
        ("GFLOPs", "right", f"{sum(stage.gflops for stage in stages):.3f}"),
    ]
    for name, justify, footer in columns:
        table.add_column(name, justify=justify, footer=footer)
    for stage in stages:
        table.add_row(
            plain(stage.name),
            stage.resolution,
            str(stage.channels),
            str(stage.blocks or ""),
            "yes" if stage.attention else "",
            f"{stage.parameters:,}",
            f"{stage.gflops:.3f}",
        )
    out.print("", table, "")
