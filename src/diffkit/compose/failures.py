"""Errors that end a training: the state is saved, and the error names the part, the need or the batch it came from."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from diffkit.compose.culprit import culprit
from diffkit.compose.parts import PART_KINDS, chosen_parts, find, trial_network
from diffkit.config import Settings
from diffkit.errors import DiffkitError, ExitCode
from diffkit.names import bytes_text, command
from diffkit.registry import Part, word

if TYPE_CHECKING:
    from diffkit.compose.training import Training
    from diffkit.engine.progress import Diverged
    from diffkit.engine.session import NotSaved, Saved
    from diffkit.engine.train import NonFinite

SHOWN = 10


def ended_by(
    training: Training, error: BaseException, begun: int
) -> tuple[Saved | NotSaved | None, DiffkitError | None]:
    """Save the state of a training that began at `begun` images; returns how that went, and the error to raise instead.

    None for the first where there was nothing to save, for the second where `error` itself is to be raised.
    """
    from diffkit.engine.devices import is_memory
    from diffkit.engine.progress import Diverged
    from diffkit.engine.train import OutOfMemory

    if isinstance(error, Diverged):
        found = training.named(error.found)
        with suppress(DiffkitError):
            training.add_to_metrics(found)
        failure = _diverged(error, found, training)
        return None, failure
    outcome = _save(training, begun)
    stands = _what_stands(outcome, begun) if training.world.leads else ""
    if is_memory(error) or isinstance(error, OutOfMemory):
        return outcome, _short_of_memory(error, training, stands)
    if isinstance(error, DiffkitError):
        return outcome, None
    if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return outcome, None  # it may well be the user's
    ended = _part_failed(error, training, stands)
    if ended is None and isinstance(error, SystemExit):
        said = f"{type(error).__name__}: {error}"
        ended = DiffkitError(
            f"Something ended the training after {training.state.images_seen:,} images: {said}.",
            stands,
            code=ExitCode.BUG,
        )
    return outcome, ended


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn an error about too little memory, before there is a training, into a DiffkitError (exit code 4)."""
    from diffkit.engine.devices import first_line, is_memory

    try:
        yield
    except Exception as error:
        if not is_memory(error):
            raise
        raise DiffkitError(
            f"The memory does not suffice to begin: {first_line(error)}.",
            "Close what else runs, or choose a smaller network with --preset.",
            code=ExitCode.MACHINE,
        ) from error


def _save(training: Training, begun: int) -> Saved | NotSaved | None:
    """The state as it was after the last step; None if that is no news, or not this process's to write."""
    from diffkit.engine.session import NotSaved, Saved

    state, start = training.state, time.perf_counter()
    if not training.world.leads or state.images_seen == begun:
        return None
    if state.updating:
        return NotSaved(state.images_seen, "it ended amid an update of the weights.")
    try:
        training.saver.wait()
        state.forget_pass()
        training.save().result()
    except Exception as error:
        return NotSaved(state.images_seen, str(error) or type(error).__name__)
    return Saved(state.images_seen, time.perf_counter() - start)


def _what_stands(outcome: Saved | NotSaved | None, begun: int) -> str:
    """What became of the state of a training that had begun at `begun` images."""
    from diffkit.engine.session import NotSaved

    if isinstance(outcome, NotSaved):
        return f"It could not be saved: {outcome.reason} What was saved before stands."
    if outcome is not None:
        return "Saved; the same command goes on from there."
    return "Nothing has been trained since the last checkpoint." if begun else "Nothing had been trained yet."


def _part_failed(error: BaseException, training: Training, stands: str) -> DiffkitError | None:
    """The error as that of a plugin's part, if it was raised in the code of one."""
    networks = (training.state.network, training.state.average)
    found = culprit(error, [part for part in _parts(training.settings) if not part.builtin], networks)
    if found is None:
        return None
    part, cause = found
    said = f"{type(cause).__name__}: {cause}".rstrip(": .")
    return DiffkitError(
        f"The {word(part.kind)} '{part.name}' of the plugin {part.distribution} {part.version} "
        f"failed after {training.state.images_seen:,} images: {said}.",
        f"{stands} Its authors will want what `diffkit --debug train ...` prints.".strip(),
        code=ExitCode.BUG,
    )


def _diverged(error: Diverged, found: NonFinite, training: Training) -> DiffkitError:
    """The same error, with the images of the batch, the last sound checkpoint, and what to try."""
    from diffkit.engine.checkpoint import latest_checkpoint

    run, batch = training.run, ""
    if found.examples:
        more = len(found.examples) - SHOWN
        rest = f" and {more} more, all named in {run.metrics}" if more > 0 else ""
        batch = f" Its batch: {', '.join(found.examples[:SHOWN])}{rest}."
    try:
        checkpoint, _ = latest_checkpoint(run.checkpoints)
    except DiffkitError:
        checkpoint = None
    train, smaller = ("train", training.store.path, "-o", "NEW"), ("--lr", f"{training.recipe.lr / 3:.1g}")
    if checkpoint is None or not checkpoint.images_seen:
        hint = "The only checkpoint is that of the beginning. Begin with a smaller learning rate: "
        hint += command(*train, *smaller)
    else:
        path = run.checkpoints / f"images-{checkpoint.images_seen:012d}"
        hint = f"The last checkpoint, {path}, is sound. "
        hint += f"Begin from it with a smaller learning rate: {command(*train, '--init', run.path, *smaller)}"
    if found.first is not None and not error.tried:
        hint += "\nIf it is a matter of single batches, --on-nan skip or --on-nan rollback leaves them out."
    return DiffkitError(error.message + batch, hint, code=ExitCode.NON_FINITE)


def _short_of_memory(error: BaseException, training: Training, stands: str) -> DiffkitError:
    """The memory does not suffice, in passes of one image either: what this training needs, roughly."""
    from diffkit.engine.devices import first_line, machine_memory, memory_bytes

    device = training.device
    has = machine_memory() if device.type == "cpu" else memory_bytes(device)
    need = f"about {bytes_text(_needed_bytes(training))} beside torch itself"
    there = "" if has is None else f"; {device} has {bytes_text(has)} in all"
    said = error.message if isinstance(error, DiffkitError) else f"The memory does not suffice: {first_line(error)}."
    return DiffkitError(
        said,
        f"With one image a pass it needs {need}{there}, and a process may be allowed less. Close what else runs, or "
        f"train a smaller network (--preset) or smaller images (--size). {stands}",
        code=ExitCode.MACHINE,
    )


def _needed_bytes(training: Training) -> int:
    """Weights, gradients, moments and averages, what a pass of one image keeps, and the copy that is being saved."""
    from diffkit.engine.devices import activation_bytes

    weights = sum(p.numel() * p.element_size() for p in training.state.network.parameters())
    averages = 1 + len(training.state.tracks)
    copies = 3 + averages if training.device.type == "cpu" else 0
    try:
        network, inputs, condition = trial_network(training.settings, training.spec)
        kept = activation_bytes(lambda: network(*inputs, **condition))
    except Exception:  # perhaps of a plugin's network; weights and averages are counted all the same
        kept = 0
    return weights * (4 + averages + copies) + kept


def _parts(settings: Settings) -> list[Part]:
    chosen = [(PART_KINDS[key], choice) for key, choice in chosen_parts(settings).items()]
    chosen += [("samplers", settings.sample.sampler), ("schedules", settings.sample.scheduler)]
    found = list[Part]()
    for kind, choice in chosen:
        with suppress(DiffkitError):  # a sampler that is not installed has raised nothing
            found.append(find(kind, choice))
    return found
