"""Ways of sampling, side by side: the same seeds, the same real images, one distance."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffkit.compose.model import Model
from diffkit.compose.reference import Reference, Working
from diffkit.compose.sampled import sampled

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.engine.sample import Plan
    from diffkit.measure.estimate import Estimate
    from diffkit.measure.tradeoff import Candidate


@dataclass(frozen=True)
class Way:
    """A model and how it is to sample; None = the model's own setting. `settings`: what it is called in the table."""

    model: Model
    settings: dict[str, Any]
    sampler: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None


def ways(
    models: Sequence[tuple[dict[str, Any], Model]],
    samplers: Sequence[str | None],
    schedulers: Sequence[str | None],
    steps: Sequence[int | None],
    guidances: Sequence[float | None],
) -> list[Way]:
    """Every combination."""
    return [
        Way(model, settings, sampler, scheduler, count, guidance)
        for (settings, model), sampler, scheduler, guidance, count in itertools.product(
            models, samplers, schedulers, guidances, steps
        )
    ]


def compare(
    reference: Reference, against: str, metric: str, chosen: Sequence[Way], count: int, seed: int = 0
) -> Generator[Working, None, list[Candidate]]:
    """Measure each way with `count` images of the same seed; yields progress.

    Raises DiffkitError for a way that cannot be taken, before the first is.
    """
    from diffkit.measure.images import clipped
    from diffkit.measure.scores import score
    from diffkit.measure.tradeoff import Candidate, burnt

    reference.check_part(against)
    for each in chosen:
        reference.check_fits(each.model)
        _plan(each, seed)
    yield from reference.look()
    real, labels = reference.features(against), reference.labels(against)
    result, usual = [], clipped(reference.train)
    for number, each in enumerate(chosen):
        yield Working("Comparing", number, len(chosen))
        plan = _plan(each, seed)
        made = yield from sampled(each.model, plan, count, labels)
        found = yield from reference.look_at(made.images)
        estimate = score(metric, real, found, reference.names)
        settings = {**each.settings, **plan.names, "guidance": plan.guidance.scale}
        share = clipped(made.images)
        result.append(Candidate(settings, made.calls, made.seconds, count, estimate, share, burnt=burnt(share, usual)))
    return result


def _plan(way: Way, seed: int) -> Plan:
    return way.model.plan(
        sampler=way.sampler, scheduler=way.scheduler, steps=way.steps, guidance=way.guidance, seed=seed
    )


def real_against_real(reference: Reference, against: str, metric: str, count: int) -> Estimate | None:
    """What a perfect model would get at this number of images; None if there are too few real ones. After `look`."""
    from diffkit.measure.scores import halves, score

    parts: tuple[Tensor, Tensor] | None = halves(reference.features(against), count)
    return None if parts is None else score(metric, *parts, reference.names)
