"""How a training begins: the network, its way of computing and its state, from settings, data and what is on disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.machine import ENDLESS, Length, with_precision, with_way
from diffkit.compose.model import check_finite, model_path
from diffkit.compose.parts import denoiser_of, network_of
from diffkit.compose.settings import new_settings, resumed_settings, training_spec
from diffkit.compose.training import Training
from diffkit.config import Settings, differences, to_tables
from diffkit.engine.distributed import ALONE, World
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from diffkit.engine.checkpoint import Checkpoint
    from diffkit.engine.store import Store
    from diffkit.engine.train import Recipe


def prepare_training(
    given: Mapping[str, Any],
    store: Store,
    run: RunDir,
    device_name: str,
    world: World = ALONE,
    length: Length = ENDLESS,
) -> Training:
    """A new run with the settings `given` (nested tables), or the one that is there, checked against them.

    `length`: how long it will train, which decides whether a new run may be compiled.

    Of a new run nothing is written yet: that is `Training.begin`. Of an old one the caller holds the lock. Raises
    DiffkitError if the run was begun with other settings or other data.
    """
    import torch

    from diffkit.engine.checkpoint import latest_checkpoint, set_aside
    from diffkit.engine.devices import choose_device, choose_kernels, keep_freed_memory
    from diffkit.engine.speed import prepared
    from diffkit.engine.train import State

    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    settings = resumed_settings(given, store, run) if run.exists else new_settings(given, store, device, world.size)
    spec = training_spec(settings, store.spec)
    checkpoint, notes = None, []
    if run.exists:
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        _check_belongs(checkpoint, run)
        notes = [f"{problem} An older checkpoint is used instead." for problem in damaged.values()]
        if world.leads:
            run.check_writable()
            set_aside(damaged)
    torch.manual_seed(settings.train.seed)
    network = network_of(settings, spec)
    _check_parameters(network)
    if settings.train.init and checkpoint is None:
        notes += _initialise(network, Path(settings.train.init))
    network.to(device)
    choose_kernels(device, settings.train.exact_elastic)
    settings = with_precision(settings, network, spec, device)
    settings, way, tried = with_way(settings, network, spec, device, probe=not run.exists, world=world, length=length)
    notes += tried
    run_as = prepared(network, way)  # before the averages are copied from it, so that all have one layout
    recipe = _recipe(settings)
    state = State(network, recipe)
    if checkpoint is not None:
        state.restore(checkpoint)
    training = Training(
        run=run,
        settings=settings,
        spec=spec,
        store=store,
        state=state,
        denoiser=denoiser_of(run_as, settings, device, settings.train.precision),
        recipe=recipe,
        device=device,
        notes=notes,
        world=world,
    )
    training.check()
    return training


def _check_belongs(checkpoint: Checkpoint | None, run: RunDir) -> None:
    """Raises DiffkitError (exit code 7) if there is no checkpoint, or one of another config.toml, in a trained run."""
    if checkpoint is None:
        if not run.traces:
            return
        raise DiffkitError(
            f"{run.path} has been trained (it holds {', '.join(run.traces)}), but has no checkpoint to go on from.",
            "Nothing is begun anew over it: restore its checkpoints/, or train into another place with -o NEW; "
            f"--init {shlex.quote(str(run.path))} begins there with its weights.",
            code=ExitCode.MODEL,
        )
    if checkpoint.config and checkpoint.config != run.config_sha256():
        raise DiffkitError(
            f"{run.config} is not what it was when the checkpoint was written{_edits(run)}.",
            "The run cannot go on with it. Restore it, or train with other settings into another place with -o.",
            code=ExitCode.MODEL,
        )


def _edits(run: RunDir) -> str:
    """What is set otherwise than in the model of the run, if that can be read; as an end of a sentence."""
    from diffkit.engine.modelfile import read_model_header

    edits: list[str] = []
    with suppress(DiffkitError):
        edits = differences(read_model_header(run.model)["settings"], to_tables(run.settings()))
    return f": {', '.join(edits)}" if edits else ""


def _initialise(network: nn.Module, path: Path) -> list[str]:
    """Copy the weights that fit; returns a note about those that do not (new classes)."""
    from diffkit.engine.modelfile import read_model

    tensors, _ = read_model(model_path(path))
    own = network.state_dict()
    fitting = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise DiffkitError(f"No weight of {path} fits this network.", code=ExitCode.MODEL)
    network.load_state_dict(fitting, strict=False)
    check_finite(network, path)
    fresh = [name for name in own if name not in fitting]
    return [f"Started from {path}; new, because they do not fit: {', '.join(fresh)}."] if fresh else []


def _recipe(settings: Settings) -> Recipe:
    from diffkit.engine.train import Recipe

    train = settings.train
    assert train.batch_size is not None and train.micro_batch is not None and train.lr is not None
    return Recipe(
        batch_size=train.batch_size,
        micro_batch=train.micro_batch,
        lr=train.lr,
        warmup_images=train.warmup_images,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
        clip=train.clip,
        ema_half_life=train.ema_half_life,
        seed=train.seed,
        ema_lengths=tuple(train.ema_lengths) if train.ema_snapshots else (),
        learned_weighting=train.learned_weighting,
        exact_elastic=train.exact_elastic,
    )


def _check_parameters(network: nn.Module) -> None:
    if not any(p.requires_grad for p in network.parameters()):
        raise DiffkitError("The backbone has no parameter to train.")
