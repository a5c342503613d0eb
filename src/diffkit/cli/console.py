"""Consoles and the little that all commands print alike. Messages go to standard error, data to standard output."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from diffkit import durable, names, paths
from diffkit.cli import output
from diffkit.errors import DiffkitError, ExitCode, did_you_mean
from diffkit.names import shown

if TYPE_CHECKING:
    from diffkit.compose.reference import Working
    from diffkit.measure.estimate import Estimate

Result = TypeVar("Result")

NARROWEST = 20  # columns of a bar
TABLE = 80  # columns
UNLIMITED = 100_000  # columns


class _Data(Console):
    """Tables keep their width, and go on in the next line of a narrower terminal, rather than lose their content.

    In a file or a pipe they are as wide as their content: no cell is cut or folded there.
    """

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        return ConsoleDimensions(max(found.width, TABLE) if self.file.isatty() else UNLIMITED, found.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new


# Of several processes that work as one, only the first speaks.
_silent = os.environ.get("RANK", "0") != "0"
err = Console(stderr=True, soft_wrap=True, emoji=False, quiet=_silent)
out = _Data(soft_wrap=True, emoji=False, quiet=_silent)

LARGEST = 10**6  # pixels a side
LONGEST = 10_000 * 86_400  # seconds
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def plain(text: str) -> str:
    """Text from outside (file names): no markup, no control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def is_live() -> bool:
    """Whether messages go to a terminal that can draw: FORCE_COLOR and the like make colours of a file, not bars."""
    return err.is_interactive and err.file.isatty() and err.width >= NARROWEST


def say(text: str = "") -> None:
    """A line of ours, with markup."""
    err.print(text, highlight=False)


def next_command(*words: str | Path) -> None:
    """The diffkit command to run next, as it can be pasted."""
    say(f"Next: [bold]{plain(names.command(*words))}[/]")


def print_json(value: Any) -> None:
    """Machine-readable output: valid JSON, whatever the encoding."""
    if not _silent:
        unicode = (output.data().encoding or "utf-8").lower().replace("-", "") == "utf8"
        print(json.dumps(value, indent=2, ensure_ascii=not unicode), file=output.data())


def require_vacant(path: Path) -> None:
    """Raises DiffkitError if something is there already, or if nothing can be put there: before the work, not after."""
    if not durable.vacant(path):
        raise DiffkitError(f"{path} already holds something.", "Nothing is overwritten; choose another place with -o.")
    above = next(each for each in (path.absolute(), *path.absolute().parents) if paths.exists(each))
    if not (paths.is_folder(above) and durable.writable(above)):
        reason = "No permission to write in" if paths.is_folder(above) else "There can be no folder in the file"
        raise DiffkitError(f"{reason} {above}.", "Choose another place with -o.", code=ExitCode.MACHINE)


def make_parent(path: Path) -> None:
    """Make the folder that a new file goes into."""
    durable.make_folders(path.parent)


def chosen_among(option: str, value: str, known: Sequence[str]) -> None:
    """Raises DiffkitError unless the value of an option is a known one."""
    if value not in known:
        raise DiffkitError(f"{option} cannot be '{value}'.", f"{did_you_mean(value, known)}Choose {', '.join(known)}.")


def progress() -> Progress:
    """A progress bar that vanishes when done; nothing on a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not is_live(),
    )


def drawn(work: Generator[Working, None, Result]) -> Result:
    """Show work as it goes on, a bar for each kind of it; returns what it was for."""
    with progress() as bar:
        tasks: dict[str, TaskID] = {}
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if event.what not in tasks:
                tasks[event.what] = bar.add_task(event.what, total=event.total)
            bar.update(tasks[event.what], completed=event.done, total=event.total)


def figure(value: float) -> str:
    """Four significant digits, never in powers of ten."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 6))}f}"


def interval(of: Estimate, *, percent: bool = False) -> str:
    """ "0.012 to 0.034"; empty where there is none."""
    if of.low is None or of.high is None:
        return ""
    return f"{of.low:.1%} to {of.high:.1%}" if percent else f"{figure(of.low)} to {figure(of.high)}"


def count_text(count: int, noun: str) -> str:
    """ "1 image", "1,200 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(text: str) -> float:
    """ "30m", "1.5h", "90s" or "1h30m" -> seconds. Raises DiffkitError otherwise."""
    pieces = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text.strip().lower())
    seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    if not pieces or "".join(number + unit for number, unit in pieces) != text.strip().lower():
        raise DiffkitError(f"{shown(text)} is not a duration.", "Write 90s, 30m, 2h or 1h30m.")
    if seconds > LONGEST:
        raise DiffkitError(f"{shown(text)} is too long.", f"At most {LONGEST // _UNITS['d']:,}d can be timed.")
    return seconds


def count_or_auto(option: str, text: str) -> int | None:
    """ "64" -> 64, "auto" -> None. Raises DiffkitError for anything else."""
    if text.strip().lower() == "auto":
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,14}", text.strip()):
        raise DiffkitError(f"{option} cannot be {shown(text)}.", "Give a number, at least 1, or auto.")
    return int(text)


def clock(seconds: float) -> str:
    """3725 -> "1h02m"; 65 -> "1m05s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def image_size(text: str) -> tuple[int, int]:
    """ "128" or "96x128" (height x width) -> (height, width). Raises DiffkitError otherwise."""
    match = re.fullmatch(r"([0-9]{1,20})(?:x([0-9]{1,20}))?", text.strip().lower())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not height or not width:
        raise DiffkitError(
            f"{shown(text)} is not an image size.", "Write --size 128, or height x width: --size 96x128."
        )
    if max(height, width) > LARGEST:
        raise DiffkitError(f"--size {text} is too large.", f"The most is {LARGEST}x{LARGEST}.")
    return height, width
