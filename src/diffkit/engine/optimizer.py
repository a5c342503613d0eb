"""AdamW (Loshchilov and Hutter 2019), by torch's own function.

Its class would do the same, but loads torch's compiler when it is made, which takes as long as importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor | None = None) -> None:
        """Change every parameter that has a gradient; none, and no moment, where `finite` is false.

        That flag lies on the device, and needs `fused`.
        """
        places = [place for place, parameter in enumerate(self.parameters) if parameter.grad is not None]
        parameters = [self.parameters[place] for place in places]
        slots = [self._slots_of(place) for place in places]
        steps, means, squares = ([each[slot] for each in slots] for slot in SLOTS)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            means,
            squares,
            [],
            steps,
            fused=self.fused,
            found_inf=None if finite is None else 1.0 - finite.float(),
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def forget_gradients(self) -> None:
        """Until the next backward pass there are none."""
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over slots that were saved, by names such as "3.exp_avg"."""
        self.slots = {}
        for name, value in tensors.items():
            place, slot = name.split(".", 1)
            self._slots_of(int(place))[slot].copy_(value)

    def _slots_of(self, place: int) -> dict[str, Tensor]:
        """In the parameter's own layout: fused functions walk through both side by side."""
        if place not in self.slots:
            parameter = self.parameters[place].detach()
            step = torch.zeros((), dtype=torch.float32, device=parameter.device if self.fused else "cpu")
            moments = {slot: torch.zeros_like(parameter) for slot in SLOTS[1:]}
            self.slots[place] = {"step": step, **moments}
        return self.slots[place]
