"""How is a shard updated? AdamW on flat segments, whoever's they are.

The same class updates what a rank owns and what it keeps for another: same segments, same gradients, same count of
updates, hence the same bits. torch's fused kernel works element by element in units of 64 bytes from the start of a
tensor, so neither the number of threads nor the process changes a bit; lengths are the owner's, so nor does a tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from concertina.config import TrainingConfig
from concertina.layout import Box, Segment

__all__ = ["KINDS", "FlatAdamW", "Views"]

KINDS = ("master", "exp_avg", "exp_avg_sq")

Views = tuple[Tensor, Tensor, Tensor]
"""Live storage of a piece, of each of KINDS."""


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) over flat `segments`, one master weight each, which are taken over and not
    copied; `updates` counts the steps applied. Without `initial` everything but padding is room that state is moved
    into."""

    def __init__(
        self, segments: Sequence[Segment], masters: Sequence[Tensor], training: TrainingConfig, initial: bool = True
    ) -> None:
        assert [segment.length for segment in segments] == [len(master) for master in masters]
        self.segments = list(segments)
        self.updates = 0
        self.masters = [torch.nn.Parameter(master) for master in masters]
        groups = [
            {"params": [master], "weight_decay": training.weight_decay if segment.decay else 0.0}
            for segment, master in zip(segments, self.masters, strict=True)
        ]
        betas = (training.adam_beta1, training.adam_beta2)
        # The moments are made here rather than at the first step, so that state can be moved into them.
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=training.adam_epsilon, fused=True)
        moment = torch.zeros_like if initial else torch.empty_like
        for segment, master in zip(segments, self.masters, strict=True):
            state = {"exp_avg": moment(master), "exp_avg_sq": moment(master)}
            for tensor in (master.detach(), *state.values()):
                tensor[segment.filled :] = 0.0
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{name: tensor.detach() for name, tensor in state.items()},
            }

    def apply(self, gradients: Sequence[Tensor], scale: float, rate: float) -> None:
        """Update with `scale` times the summed gradients, which are scaled in place, at learning rate `rate`."""
        self.updates += 1
        for group, master, gradient in zip(self._adamw.param_groups, self.masters, gradients, strict=True):
            group["lr"] = rate
            master.grad = gradient.mul_(scale)
            self._adamw.state[master]["step"].fill_(self.updates - 1)
        self._adamw.step()
        for master in self.masters:
            master.grad = None

    def views(self) -> dict[str, tuple[Box, Views]]:
        """Every piece by parameter: its global box and its live storage of each kind."""
        found: dict[str, tuple[Box, Views]] = {}
        for segment, master in zip(self.segments, self.masters, strict=True):
            state = self._adamw.state[master]
            flat = (master.detach(), state["exp_avg"], state["exp_avg_sq"])
            for slot in segment.slots.values():
                if slot.numel:
                    cut = slice(slot.offset, slot.offset + slot.numel)
                    first, second, third = (tensor[cut].view(slot.shape) for tensor in flat)
                    found[slot.name] = (slot.box, (first, second, third))
        return found

    def pieces(self) -> dict[str, tuple[Box, Tensor]]:
        """The same by `<kind>/<parameter>`, as checkpoints name them."""
        views = self.views()
        return {
            f"{kind}/{name}": (box, view)
            for number, kind in enumerate(KINDS)
            for name, (box, kinds) in views.items()
            for view in (kinds[number],)
        }
