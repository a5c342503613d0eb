"""`diffkit sample`: a run or a model -> a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from diffkit.cli.options import MOST_IMAGES, MOST_SEED, MOST_STEPS, PART, AsJson, Device, Gpus, Precision

LABELS, SOURCE, GUIDANCE, SAMPLER = "What the images show", "From images", "Guidance", "Sampler"


def sample(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model.safetensors.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for the images; by default samples/MODEL.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("-n", "--count", min=1, max=MOST_IMAGES, help="How many images: 64, or one for each image given."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME[=SHARE]",
            help="Of this class; several take turns, or are mixed if they have shares. By default all.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    set_label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="With this attribute, such as age=0.3.", rich_help_panel=LABELS),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Of no class in particular.", rich_help_panel=LABELS)
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Larger than the training images, in tiles.", rich_help_panel=LABELS),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--input", help="Images for a model that was trained with --task: a file or folder.", rich_help_panel=SOURCE
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Begin with these images, not with noise: a file or folder.", rich_help_panel=SOURCE
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --from is made anew, 0 to 1; 0.6 unless given.", rich_help_panel=SOURCE),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="White where --from (or --input) is made anew; the rest stays.", rich_help_panel=SOURCE),
    ] = None,
    noise: Annotated[
        Path | None, typer.Option(help="Begin with the noise that diffkit invert found.", rich_help_panel=SOURCE)
    ] = None,
    resample: Annotated[
        int, typer.Option(help="Passes over each step with --mask: a better fit, and slower.", rich_help_panel=SOURCE)
    ] = 1,
    crop: Annotated[
        str | None,
        typer.Option(help="For images of another shape: center or pad.", rich_help_panel=SOURCE),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strictly to follow the label; 1 = none.", rich_help_panel=GUIDANCE)
    ] = None,
    guide: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_OR_CHECKPOINT", help="Also guide away from this worse model.", rich_help_panel=GUIDANCE
        ),
    ] = None,
    guide_scale: Annotated[float, typer.Option(help="How far; 1 = not at all.", rich_help_panel=GUIDANCE)] = 2.0,
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Only at noise levels between these.", rich_help_panel=GUIDANCE),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0 to 1: take back the contrast that it adds.", rich_help_panel=GUIDANCE)
    ] = 0.0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Dynamic thresholding at this share of the pixels, 0.995.", rich_help_panel=GUIDANCE),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar=PART, help="See: diffkit plugins list samplers.", rich_help_panel=SAMPLER)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="More steps: better and slower.", rich_help_panel=SAMPLER)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar=PART, help="The shape of the sampling grid.", rich_help_panel=SAMPLER)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Image i depends on the seed and on i.", rich_help_panel=SAMPLER)
    ] = 0,
    only: Annotated[
        list[int] | None,
        typer.Option(metavar="INDEX", min=0, max=MOST_IMAGES, help="Image INDEX, instead of -n images; repeatable."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Weights as last trained, without averaging.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at once; changes nothing else.")] = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Make images: PNG files, in class folders when the model knows classes, samples.jsonl and grid.png.

    From noise, or from images: --from FILE --strength 0.6 varies them, with --mask FILE only a part is made anew.
    """
    import time
    from dataclasses import replace

    from diffkit import paths
    from diffkit.cli.asked import Asked, pair_of_numbers
    from diffkit.cli.console import clock, count_text, plain, print_json, require_vacant, say
    from diffkit.cli.folder import make
    from diffkit.cli.launch import launch, launched
    from diffkit.compose import load_model
    from diffkit.engine.distributed import joined
    from diffkit.errors import DiffkitError
    from diffkit.rundir import unused

    if gpus > 1 and not launched():
        launch(gpus, device)
    if precision not in {"auto", "float32", "bfloat16"}:
        raise DiffkitError(f"No precision called '{precision}'.", "Choose auto, float32 or bfloat16.")
    loaded = load_model(model, device=device, precision=precision, raw=raw)
    asked = Asked.of(
        loaded,
        classes=classes or [],
        attributes=set_label or [],
        unlabelled=unlabelled,
        size=size,
        inputs=inputs,
        source=source,
        mask=mask,
        crop=crop,
        noise=noise,
        seed=seed,
    )
    if strength is not None and source is None:
        raise DiffkitError("--strength says how much of an image is made anew.", "Give the image: --from FILE.")
    plan = loaded.plan(
        sampler=sampler,
        scheduler=scheduler,
        steps=steps,
        strength=strength if strength is not None else 0.6 if source and not mask else 1.0,
        guidance=guidance,
        guide=load_model(guide, device=device, precision=precision) if guide else None,
        guide_scale=guide_scale,
        interval=pair_of_numbers("--guidance-interval", guidance_interval),
        rescale=guidance_rescale,
        threshold=threshold,
        resample=resample,
        seed=seed,
    )
    indices: Sequence[int] = sorted(set(only)) if only else range(count or asked.count)
    name = model.resolve().parent.name if paths.is_file(model) else model.resolve().name
    how = {"raw": raw, **({"guide": str(guide)} if guide else {})}
    with joined(device) as world:
        target = out or unused(Path("samples") / name)
        require_vacant(target)
        world.wait()  # until all have found the same free place
        start = time.perf_counter()
        calls = make(replace(loaded, world=world), plan, indices, asked, target, batch_size, how)
    seconds = time.perf_counter() - start
    if as_json:
        figures = {"path": str(target), "images": len(indices), "seconds": round(seconds, 3), "network_calls": calls}
        print_json({**figures, **plan.names, "guidance": plan.guidance.scale, "seed": seed, "model": loaded.sha256})
        return
    steps_text, calls_text = count_text(plan.names["steps"], "step"), count_text(calls, "network call")
    means = f"{plain(plan.names['sampler'])}, {steps_text} = {calls_text} each"
    say(
        f"[green]{count_text(len(indices), 'image')}[/] with {means}, "
        f"in {clock(seconds)} ({len(indices) / seconds:.1f} img/s): [bold]{plain(str(target))}[/]"
    )
