"""`diffkit prepare`: a folder of images -> a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit.cli.options import PART, AsJson

if TYPE_CHECKING:
    from diffkit.engine.prepare import Finished
    from diffkit.interfaces import Account


def prepare(
    source: Annotated[str, typer.Argument(help="A folder or zip of images, or whatever --source reads.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for the data set; by default SOURCE-SIZE.")
    ] = None,
    source_part: Annotated[
        str, typer.Option("--source", metavar=PART, help="Dataset source, with its options.")
    ] = "folder",
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A table of labels by file name: .csv, .tsv, .jsonl or .json.")
    ] = None,
    labels_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its column of file names; by default found by itself.")
    ] = None,
    label_columns: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Its columns that become attributes; by default all.")
    ] = None,
    class_column: Annotated[str | None, typer.Option(metavar="NAME", help="Its column that names the class.")] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Input images by the same names, for train --task translate.")
    ] = None,
    size: Annotated[str, typer.Option(help="Pixels: 128, or height x width: 96x128.")] = "128",
    crop: Annotated[str, typer.Option(help="center, random or pad. The aspect ratio is always kept.")] = "center",
    color: Annotated[str, typer.Option(help="color, gray or auto.")] = "auto",
    background: Annotated[str, typer.Option(help="Colour under transparency and padding.")] = "white",
    holdout: Annotated[
        str | None,
        typer.Option(help="Share kept from training, for honest measurement; by default a val folder's images, or 5%."),
    ] = None,
    min_side: Annotated[int, typer.Option(help="Reject images whose shorter side has fewer pixels.")] = 0,
    max_rejected: Annotated[str, typer.Option(help="Give up if more than this share is rejected.")] = "5%",
    strict: Annotated[bool, typer.Option("--strict", help="Write nothing unless every file and label fits.")] = False,
    white_level: Annotated[
        int, typer.Option(help="The sample of 16-bit images that means white: 4095 for 12-bit data.")
    ] = 65535,
    workers: Annotated[int, typer.Option(help="Images decoded at once; 0 = one per core.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read every image once, crop it to one size, and pack them for training.

    Sub-folders become classes. Whatever cannot be read is listed in rejected.jsonl with the reason.
    Nothing of yours is changed or deleted.
    """
    from itertools import count

    from diffkit.cli.console import image_size, next_command, plain, print_json, progress, say
    from diffkit.compose.parts import completed
    from diffkit.config import PartChoice
    from diffkit.datasets.join import identity
    from diffkit.datasets.metadata import Table
    from diffkit.datasets.pairs import paired
    from diffkit.engine.prepare import Finished, PrepareOptions
    from diffkit.engine.prepare import prepare as prepare_images
    from diffkit.errors import DiffkitError
    from diffkit.rundir import unused

    height, width = image_size(size)
    channels = {"auto": 0, "gray": 1, "grey": 1, "color": 3, "colour": 3}.get(color)
    if channels is None:
        raise DiffkitError(f"--color {color} is not known.", "Choose color, gray or auto.")
    options = PrepareOptions(
        height=height,
        width=width,
        crop=crop,
        channels=channels,
        background=_colour(background),
        holdout=_share(holdout or "5%", "--holdout"),
        keep_split=holdout is None,
        strict=strict,
        workers=workers,
        white_level=white_level,
        min_side=min_side,
        max_rejected=_share(max_rejected, "--max-rejected"),
    )
    choice, read = completed("datasets", PartChoice.model_validate(source_part))
    if labels is None and (label_columns or class_column or labels_column):
        raise DiffkitError(
            "--labels-column, --label-columns and --class-column are about a table.", "Name it: --labels FILE."
        )
    name = Path(source).name.removesuffix(".zip") or Path(source).resolve().name
    examples = read(source)
    if labels is not None:
        columns = [column.strip() for column in (label_columns or "").split(",") if column.strip()]
        table = Table(labels, columns, class_column or "", labels_column or "")
        # The names are read first, and the images once more, for a source may be too large to be kept in memory.
        examples = table.join(map(identity, examples, count()), root=name).labelled(read(source))
    if pairs is not None:
        examples = paired(examples, read(pairs))
    target = out or unused(Path(f"{name}-{size}"))
    finished: Finished | None = None
    with progress() as bar:
        task = bar.add_task("Preparing", total=None)
        for event in prepare_images(examples, target, options, source=f"{choice} {source}"):
            if isinstance(event, Finished):
                finished = event
            else:
                bar.update(task, completed=event.done)
    assert finished is not None
    if as_json:
        print_json(_summary(finished))
        return
    _describe(finished)
    say(f"Written to [bold]{plain(str(target))}[/].")
    next_command("train", target)


def _summary(finished: Finished) -> dict[str, Any]:
    return {
        "path": str(finished.path),
        "images": finished.count,
        "holdout": finished.holdout_count,
        "rejected": finished.rejected,
        "passed_over": [{"path": name, "reason": reason} for name, reason in finished.account.skipped],
        "enlarged": finished.enlarged,
        "duplicates": finished.duplicates,
        "unlabelled": finished.unlabelled,
        "spec": finished.spec.to_dict(),
        "classes": finished.class_counts,
        "remarks": finished.account.remarks,
        "problems": finished.account.problems,
        **finished.account.record,
        "warnings": list(finished.warnings),
    }


def _describe(finished: Finished) -> None:
    from diffkit.cli.console import count_text, plain, say

    spec = finished.spec
    colour = "gray" if spec.channels == 1 else "colour"
    held = f", {finished.holdout_count:,} held out" if finished.holdout_count else ", none held out"
    say(f"[green]{count_text(finished.count, 'image')}[/] of {spec.height}x{spec.width}, {colour}{held}.")
    if spec.classes:
        classes = ", ".join(f"{plain(name)} {count:,}" for name, count in list(finished.class_counts.items())[:10])
        more = f", and {len(spec.classes) - 10} more" if len(spec.classes) > 10 else ""
        say(f"{len(spec.classes)} classes: {classes}{more}.")
    elif not spec.attributes:
        say("No classes: the model will be unconditional. (Images in two or more sub-folders become classes.)")
    if spec.attributes:
        ranges = [f"{plain(each.name)} {each.low:g} to {each.high:g}" for each in spec.attributes[:10]]
        more = f", and {len(spec.attributes) - 10} more" if len(spec.attributes) > 10 else ""
        say(f"{count_text(len(spec.attributes), 'attribute')}: {', '.join(ranges)}{more}.")
    if spec.image_channels:
        say("Each has a paired input: diffkit train --task translate learns the way from one to the other.")
    if finished.unlabelled and spec.classes:
        say(f"{count_text(finished.unlabelled, 'image')} without a class, to be used without a label.")
    _describe_account(finished.account)
    if finished.enlarged:
        enlarged = count_text(finished.enlarged, "image")
        say(f"[yellow]{enlarged} smaller than {spec.height}x{spec.width}, enlarged.[/]")
    if finished.duplicates:
        say(f"{count_text(finished.duplicates, 'image')} the same as another once cropped; kept.")
    if finished.rejected:
        reasons = "; ".join(f"{plain(why)} ({count:,})" for why, count in list(finished.reasons.items())[:5])
        rejected = count_text(finished.rejected, "image")
        say(f"[yellow]{rejected} could not be used[/] ({reasons}): see rejected.jsonl.")
    for warning in finished.warnings:
        say(f"[yellow]Warning: {plain(warning)}[/]")


def _describe_account(account: Account) -> None:
    """How the source was understood, and what did not fit."""
    from collections import Counter

    from diffkit.cli.console import plain, say
    from diffkit.engine.prepare.options import plural

    for remark in account.remarks:
        say(plain(remark))
    for kind, names in account.problems.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        say(f"[yellow]{plural(len(names), plain(kind))}:[/] {plain(', '.join(names[:3]))}{more}.")
    if account.skipped:
        reasons = Counter(reason for _, reason in account.skipped).most_common(5)
        counted = "; ".join(f"{plain(reason)} ({count:,})" for reason, count in reasons)
        say(f"[yellow]{plural(len(account.skipped), 'file')} passed over[/] ({counted}): see rejected.jsonl.")


def _share(text: str, option: str) -> float:
    from diffkit.errors import DiffkitError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise DiffkitError(f"{option} {text} is no share.", "Write 5% or 0.05.")
    return value


def _colour(text: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    from diffkit.errors import DiffkitError

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise DiffkitError(f"'{text}' is not a colour.", "Write white, black or #rrggbb.") from None
