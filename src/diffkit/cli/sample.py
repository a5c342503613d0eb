"""`diffkit sample`: a run or a model -> a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit.cli.options import PART, AsJson, Device, Precision

if TYPE_CHECKING:
    from diffkit.compose import Model
    from diffkit.engine.sample import Plan

GRID_IMAGES = 100


def sample(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model.safetensors.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for the images; by default samples/MODEL.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many images.")] = 64,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Of this class; several take turns. By default all."),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Of no class in particular.")] = False,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the class; 1 = no guidance.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar=PART, help="See: diffkit plugins list samplers.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="More steps: better and slower.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar=PART, help="The shape of the sampling grid.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on the seed and on i.")] = 0,
    only: Annotated[
        list[int] | None, typer.Option(metavar="INDEX", min=0, help="Image INDEX, instead of -n images; repeatable.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Weights as last trained, without averaging.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once; changes nothing else.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Make images: PNG files, in class folders when the model knows classes, samples.jsonl and grid.png."""
    import time

    from diffkit.cli.console import clock, count_text, plain, print_json, require_vacant, say
    from diffkit.compose import load_model
    from diffkit.errors import DiffkitError
    from diffkit.rundir import unused

    if precision not in {"auto", "float32", "bfloat16"}:
        raise DiffkitError(f"No precision called '{precision}'.", "Choose auto, float32 or bfloat16.")
    loaded = load_model(model, device=device, precision=precision, raw=raw)
    names = _classes(loaded, classes, unlabelled)
    plan = loaded.plan(sampler=sampler, scheduler=scheduler, steps=steps, guidance=guidance, seed=seed)
    indices = sorted(set(only)) if only else list(range(count))
    name = model.resolve().parent.name if model.is_file() else model.resolve().name
    target = out or unused(Path("samples") / name)
    require_vacant(target)
    start = time.perf_counter()
    calls = _make(loaded, plan, indices, names, target, batch_size, raw)
    seconds = time.perf_counter() - start
    if as_json:
        figures = {"path": str(target), "images": len(indices), "seconds": round(seconds, 3), "network_calls": calls}
        print_json({**figures, **plan.names, "guidance": plan.guidance, "seed": seed, "model": loaded.sha256})
        return
    how = f"{plain(plan.names['sampler'])}, {plan.names['steps']} steps = {calls} network calls each"
    say(
        f"[green]{count_text(len(indices), 'image')}[/] with {how}, "
        f"in {clock(seconds)} ({len(indices) / seconds:.1f} img/s): [bold]{plain(str(target))}[/]"
    )


def _classes(model: Model, names: list[str] | None, unlabelled: bool) -> list[str] | None:
    """The classes to take in turn; every class by default."""
    from diffkit.errors import DiffkitError

    if unlabelled and names:
        raise DiffkitError("--class and --unlabelled contradict each other.", "Give one of them.")
    if unlabelled or not (names or model.spec.classes):
        return None
    model.class_indices(names or [])
    return names or list(model.spec.classes)


def _make(
    model: Model,
    plan: Plan,
    indices: list[int],
    names: list[str] | None,
    target: Path,
    batch_size: int | None,
    raw: bool,
) -> int:
    """Write all files; returns the network calls that each image took."""
    import numpy as np

    from diffkit import durable
    from diffkit.cli.console import progress
    from diffkit.engine.pictures import grid, save_png

    shown: list[Any] = []
    calls = 0
    folders = _folders(names)
    with durable.explained(target):
        target.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("Sampling", total=len(indices))
        for batch in model.generate(plan, indices, model.class_indices(names), batch_size=batch_size):
            calls = batch.calls
            for index, pixels in zip(batch.indices, batch.pixels, strict=True):
                label = names[index % len(names)] if names else None
                path = Path(folders[label], f"{index:06d}.png") if label is not None else Path(f"{index:06d}.png")
                with durable.explained(target):
                    (target / path).parent.mkdir(exist_ok=True)
                save_png(target / path, pixels)
                durable.append_line(
                    target / "samples.jsonl",
                    {
                        "file": path.as_posix(),
                        "index": index,
                        "seed": plan.seed,
                        "class": label,
                        **plan.names,
                        "network_calls": calls,
                        "guidance": plan.guidance,
                        "raw": raw,
                        "model": model.sha256,
                        "images_seen": model.images_seen,
                    },
                )
                if len(shown) < GRID_IMAGES:
                    shown.append(pixels)
            bar.update(task, advance=len(batch.indices))
    columns = len(names) if names and 1 < len(names) <= 10 and len(indices) >= len(names) else None
    save_png(target / "grid.png", grid(np.stack(shown), columns))
    return calls


def _folders(names: list[str] | None) -> dict[str, str]:
    """A folder name for each class: the class itself where it can be one."""
    result: dict[str, str] = {}
    for name in names or []:
        safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).strip(". ") or "_"
        while safe in result.values() and name not in result:
            safe += "_"
        result.setdefault(name, safe)
    return result
