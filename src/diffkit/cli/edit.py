"""`diffkit invert`, `interpolate`, `trajectory`: what else one's own model can do with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffkit.cli.options import MOST_SEED, MOST_STEPS, PART, Device, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.compose import Model

LABELS, SAMPLER = "What the images show", "Sampler"

ModelPath = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model.safetensors.")]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME[=SHARE]", help="Of this class; several take turns.", rich_help_panel=LABELS),
]
SetLabel = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="With this attribute.", rich_help_panel=LABELS),
]
Sampler = Annotated[str | None, typer.Option(metavar=PART, help="One that adds no noise.", rich_help_panel=SAMPLER)]
Scheduler = Annotated[
    str | None, typer.Option(metavar=PART, help="The shape of the sampling grid.", rich_help_panel=SAMPLER)
]
Steps = Annotated[
    int | None, typer.Option(min=1, max=MOST_STEPS, help="More steps: better and slower.", rich_help_panel=SAMPLER)
]
Crop = Annotated[str | None, typer.Option(help="For images of another shape: center or pad.")]
Film = Annotated[Path, typer.Option("-o", "--out", help="New film, .gif or .mp4, or a folder for its frames.")]
FramesPerSecond = Annotated[float, typer.Option(min=1, max=60, help="Frames a second.")]


def invert(
    model: ModelPath,
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder for the noise and what is made of it.")],
    classes: Classes = None,
    set_label: SetLabel = None,
    sampler: Sampler = "heun",
    scheduler: Scheduler = None,
    steps: Steps = 50,
    crop: Crop = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Find the noise from which the model makes these images (DDIM inversion).

    Writes noise.npy, for diffkit sample --noise, the images made from it, and both side by side in grid.png; prints how
    alike they are.
    """
    import io

    import numpy as np
    import torch

    from diffkit import durable
    from diffkit.cli.asked import Asked
    from diffkit.cli.console import count_text, next_command, plain, progress, require_vacant, say
    from diffkit.compose import load_model
    from diffkit.compose.editing import inverted
    from diffkit.engine.pictures import grid, psnr, save_png

    loaded = load_model(model, device=device, precision=precision)
    asked = Asked.of(loaded, classes=classes or [], attributes=set_label or [], source=images, crop=crop)
    plan = loaded.plan(sampler=sampler, scheduler=scheduler, steps=steps)
    require_vacant(out)
    assert asked.given is not None
    count, found, worth, shown = len(asked.given), [], [], []
    durable.make_folders(out)
    with progress() as bar:
        task = bar.add_task("Inverting", total=count)
        for noise in inverted(loaded, plan, asked.wishes, count):
            found.append(noise)
            indices = range(sum(map(len, found[:-1])), sum(map(len, found)))
            for batch in loaded.generate(plan, indices, asked.again(torch.cat(found)), batch_size=len(noise)):
                for index, pixels in zip(batch.indices, batch.pixels, strict=True):
                    original = asked.given.read(index)
                    worth.append(psnr(original, pixels))
                    shown += [original, pixels]
                    save_png(out / f"{index:06d}.png", pixels)
            bar.update(task, completed=indices[-1] + 1)
        file = io.BytesIO()
        np.save(file, torch.cat(found).numpy(), allow_pickle=False)
        durable.write_bytes(out / "noise.npy", file.getvalue())
        save_png(out / "grid.png", grid(np.stack(shown[:96]), 12 if len(shown) >= 12 else len(shown)))
    alike = f"PSNR {np.median(worth):.1f} dB" + (f", the worst {min(worth):.1f} dB" if count > 1 else "")
    say(f"[green]{count_text(count, 'image')}[/] inverted and made again: {alike}.")
    say(f"Written to [bold]{plain(str(out))}[/].")
    next_command("sample", model, "--noise", out / "noise.npy")


def interpolate(
    model: ModelPath,
    out: Film,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="From the image of one seed to that of the next.")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option("--from", help="From one image of yours to the next; give two or more.")
    ] = None,
    classes: Classes = None,
    set_label: SetLabel = None,
    frames: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Frames from one image to the next.")] = 24,
    fps: FramesPerSecond = 12,
    loop: Annotated[bool, typer.Option("--loop", help="And back to the first.")] = False,
    sampler: Sampler = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    crop: Crop = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """A film from image to image: between seeds, between your own images, and between classes given in turn."""
    from diffkit.cli.asked import Asked, whole_numbers
    from diffkit.cli.console import count_text, make_parent, plain, progress, require_vacant, say
    from diffkit.compose import load_model
    from diffkit.compose.editing import interpolated, start_noise
    from diffkit.engine.film import check_film, save_film
    from diffkit.errors import DiffkitError

    if bool(seeds) == bool(source):
        raise DiffkitError("Between what?", "Give --seeds 0,1,2, or two or more of --from IMAGE.")
    check_film(out)
    require_vacant(out)
    loaded = load_model(model, device=device, precision=precision)
    # Images of one's own are inverted without a label unless one is given, so they are made again without.
    plain_ones = bool(source) and not classes and not set_label
    asked = Asked.of(loaded, classes=classes or [], attributes=set_label or [], unlabelled=plain_ones)
    plan = loaded.plan(sampler=sampler, scheduler=scheduler, steps=steps)
    if source:
        noises = [_inverted(loaded, path, classes or [], set_label or [], crop) for path in source]
    else:
        noises = [start_noise(loaded, seed) for seed in whole_numbers("--seeds", seeds or "")]
    if len(noises) < 2:
        raise DiffkitError("One image leads nowhere.", "Give two seeds or images, or more.")
    labels = asked.label_of(len(noises))
    total = (len(noises) if loop else len(noises) - 1) * frames + (not loop)
    made = []
    with progress() as bar:
        task = bar.add_task("Sampling", total=total)
        for batch in interpolated(loaded, plan, noises, labels, frames, loop=loop):
            made += list(batch.pixels)
            bar.update(task, completed=len(made))
    make_parent(out)
    save_film(out, made, per_second=fps)
    say(f"[green]{count_text(len(made), 'frame')}[/]: [bold]{plain(str(out))}[/]")


def trajectory(
    model: ModelPath,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A film, .gif or .mp4, a contact sheet, .png, or a folder of frames.")
    ],
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=64, help="How many images.")] = 8,
    classes: Classes = None,
    set_label: SetLabel = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Image i depends on the seed and on i.")] = 0,
    fps: FramesPerSecond = 8,
    sampler: Annotated[str | None, typer.Option(metavar=PART, help="Any.", rich_help_panel=SAMPLER)] = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """How images come out of noise, step by step: a film, or a contact sheet with a row for each image."""
    import numpy as np

    from diffkit.cli.asked import Asked
    from diffkit.cli.console import make_parent, plain, progress, require_vacant, say
    from diffkit.compose import load_model
    from diffkit.engine.film import check_film, save_film
    from diffkit.engine.pictures import grid, save_png

    if out.suffix != ".png":
        check_film(out)
    require_vacant(out)
    loaded = load_model(model, device=device, precision=precision)
    asked = Asked.of(loaded, classes=classes or [], attributes=set_label or [])
    plan = loaded.plan(sampler=sampler, scheduler=scheduler, steps=steps, seed=seed)
    states = []
    with progress() as bar:
        task = bar.add_task("Sampling", total=len(plan.sigmas) - 1)
        for _, pixels in loaded.trajectory(plan, count, asked.wishes):
            states.append(pixels)
            bar.advance(task)
    make_parent(out)
    if out.suffix == ".png":
        chosen = sorted({round(i * (len(states) - 1) / 11) for i in range(12)})
        rows = np.stack([states[number] for number in chosen], 1)
        save_png(out, grid(rows.reshape(-1, *rows.shape[2:]), len(chosen)))
    else:
        save_film(out, [grid(each, min(count, 8)) for each in states], per_second=fps, hold=2.0)
    say(f"[green]{len(states)} steps[/]: [bold]{plain(str(out))}[/]")


def _inverted(model: Model, path: Path, classes: list[str], attributes: list[str], crop: str | None) -> Tensor:
    """The noise of one image."""
    from diffkit.cli.asked import Asked
    from diffkit.compose.editing import inverted

    asked = Asked.of(model, classes=classes, attributes=attributes, source=path, crop=crop)
    (noise,) = inverted(model, model.plan(sampler="heun", steps=50), asked.wishes, 1)
    return noise[0]
