"""AdamW (Loshchilov and Hutter 2019) and the clipping of gradients, by torch's own functions.

torch's class for AdamW loads its compiler when it is made, which takes as long as importing torch; and at every step it
sorts all tensors anew, which on a GPU takes the host longer than a small network's step takes the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

SLOTS = ("step", "exp_avg", "exp_avg_sq")
EPSILON = 1e-8


class AdamW:
    """`slots`: what is kept of each parameter (see SLOTS), by its place in `parameters`, from its first gradient on."""

    def __init__(
        self, parameters: Sequence[Tensor], betas: tuple[float, float], weight_decay: float, fused: bool | None
    ) -> None:
        self.parameters = list(parameters)
        self.betas, self.weight_decay, self.fused = betas, weight_decay, fused
        self.slots: dict[int, dict[str, Tensor]] = {}
        self._places: list[int] = []
        self._groups: list[_Group] = []

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor | None = None) -> None:
        """Change every parameter that has a gradient; none, and no moment, where `finite` is false.

        That flag lies on the device, and needs `fused`.
        """
        places = [place for place, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if places != self._places:
            self._places, self._groups = places, self._grouped(places)
        options: dict[str, Any] = {
            "amsgrad": False,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "lr": lr,
            "weight_decay": self.weight_decay,
            "eps": EPSILON,
            "maximize": False,
        }
        found_inf = None if finite is None else 1.0 - finite.float()
        for group in self._groups:
            gradients = [parameter.grad for parameter in group.parameters if parameter.grad is not None]
            tensors: tuple[Any, ...] = (group.parameters, gradients, group.means, group.squares, [], group.steps)
            if not self.fused:
                adamw(*tensors, **options)
                continue
            # As torch.optim does, which sorts all of them by device and type first.
            group.counts.add_(1)
            torch._fused_adamw_(*tensors, found_inf=found_inf, **options)
            if found_inf is not None:
                group.counts.sub_(found_inf)

    def forget_gradients(self) -> None:
        """Until the next backward pass there are none."""
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over slots that were saved, by names such as "3.exp_avg"."""
        self.slots, self._places, self._groups = {}, [], []
        for name, value in tensors.items():
            place, slot = name.split(".", 1)
            self._slots_of(int(place))[slot].copy_(value)

    def _grouped(self, places: Sequence[int]) -> list[_Group]:
        """By device and type, which one fused function takes at a time. Their counts of steps become one tensor's."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place in places:
            parameter = self.parameters[place]
            kinds.setdefault((parameter.device, parameter.dtype), []).append(place)
        groups = []
        for chosen in kinds.values():
            slots = [self._slots_of(place) for place in chosen]
            counts = torch.stack([each["step"] for each in slots])
            for each, count in zip(slots, counts.unbind(), strict=True):
                each["step"] = count
            columns = ([each[slot] for each in slots] for slot in SLOTS)
            groups.append(_Group([self.parameters[place] for place in chosen], counts, *columns))
        return groups

    def _slots_of(self, place: int) -> dict[str, Tensor]:
        """In the parameter's own layout: fused functions walk through both side by side."""
        if place not in self.slots:
            parameter = self.parameters[place].detach()
            step = torch.zeros((), dtype=torch.float32, device=parameter.device if self.fused else "cpu")
            moments = {slot: torch.zeros_like(parameter) for slot in SLOTS[1:]}
            self.slots[place] = {"step": step, **moments}
        return self.slots[place]


class _Group(NamedTuple):
    """Parameters of one device and type, and their slots; `counts` [N]: of which `steps` are the elements."""

    parameters: list[Tensor]
    counts: Tensor
    steps: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Scale the gradients so that the norm of all together is at most `most`; returns what it was, on their device.

    As `torch.nn.utils.clip_grad_norm_` (Pascanu et al. 2013, "On the difficulty of training recurrent neural
    networks").
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
