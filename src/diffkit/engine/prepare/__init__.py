"""From examples to a prepared data set: decoded within bounds, written in source order, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from diffkit import durable
from diffkit.engine.decoders import Decoders
from diffkit.engine.prepare.options import Event, Finished, Prepared, PrepareOptions
from diffkit.engine.prepare.rows import channels_of, rows
from diffkit.engine.prepare.writer import Writer
from diffkit.errors import DiffkitError
from diffkit.interfaces import Example, account_of

__all__ = ["Event", "Finished", "PrepareOptions", "Prepared", "prepare"]


def prepare(examples: Iterable[Example], out: Path, options: PrepareOptions, *, source: str = "") -> Iterator[Event]:
    """Write the prepared data set `out`, yielding `Prepared` per example and `Finished` last.

    The result depends on the examples and the options alone, byte for byte, never on the number of workers.
    Until `Finished`, nothing exists at `out`; an abandoned or failed run leaves nothing behind. Raises
    DiffkitError: `out` is there already, no usable image, too many rejected (with `strict`: anything that does not
    fit), nothing left for training, or no room on the disk.
    """
    if not durable.vacant(out):
        raise DiffkitError(f"{out} exists already.", "Choose another name with -o, or remove it first.")
    account = account_of(examples)
    with Decoders(options.workers, options.height * options.width) as decoders:
        examples, channels = channels_of(examples, options, decoders)
        with durable.new_folder(out) as folder:
            writer = Writer(folder, options, channels, account)
            try:
                for row in rows(examples, options, channels, decoders):
                    writer.add(row)
                    yield Prepared(writer.done, writer.rejected, row.id, row.reason)
                finished = writer.finish(out, source)
            finally:
                writer.close()
    yield finished
