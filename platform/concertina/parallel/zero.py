"""How do gradients get to the owner of a piece, and weights back (ZeRO-1)?

Which piece that is, `layout/buckets.py` says. Source: ZeRO (Rajbhandari et al. 2020), stage 1; expert data parallel of
DeepSpeed-MoE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concertina.layout import Box, Slot, plan_slots, segment_length
from concertina.parallel.collectives import Pending, all_gather_into, reduce_scatter_sum
from concertina.parallel.groups import Group

__all__ = ["Bucket"]


class Bucket:
    """Parameters that reduce together: gradients in, this rank's shard of the sum out, updated weights back in.

    `parameters` must be in the same order on every rank of `group`. Gradients are summed in at least fp32.
    """

    def __init__(self, parameters: dict[str, Tensor], boxes: dict[str, Box], group: Group, weight_decay: float) -> None:
        self.parameters = parameters
        self.group = group
        self.weight_decay = weight_decay
        self.slots = plan_slots({name: boxes[name] for name in parameters}, group.size)
        self.own = self.slots[group.rank]
        filled = [sum(slot.numel for slot in rank.values()) for rank in self.slots]
        length = segment_length(self.slots)
        first = next(iter(parameters.values()))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.grads = first.new_empty(group.size, length, dtype=self.dtype)
        # A group of one needs no exchange: its shard is the buffer itself.
        self.shard = self.grads[0] if group.size == 1 else self.grads.new_empty(length)
        self._padding = [self.grads[rank, used:] for rank, used in enumerate(filled) if used < length]
        self._slot_views = {name: self._views_of(self.grads, name) for name in parameters}
        self._filled: set[str] = set()
        self._pending: Pending | None = None

    def _views_of(self, buffer: Tensor, name: str) -> list[tuple[Slot, Tensor]]:
        """The places of a parameter in a rank-major buffer [size, length], empty pieces left out."""
        views = []
        for rank, slots in enumerate(self.slots):
            slot = slots[name]
            if slot.numel:
                views.append((slot, buffer[rank, slot.offset : slot.offset + slot.numel].view(slot.shape)))
        return views

    def own_views(self, segment: Tensor) -> dict[str, tuple[Slot, Tensor]]:
        """This rank's pieces inside a segment [length] (a shard, a master weight, a moment), by parameter."""
        return {
            slot.name: (slot, segment[slot.offset : slot.offset + slot.numel].view(slot.shape))
            for slot in self.own.values()
            if slot.numel
        }

    def accumulate(self, name: str, grad: Tensor) -> None:
        """Add one micro-batch's gradient of a parameter; the first one of a step overwrites."""
        first = name not in self._filled
        self._filled.add(name)
        for slot, view in self._slot_views[name]:
            piece = grad.narrow(slot.dim, slot.start, slot.stop - slot.start)
            view.copy_(piece) if first else view.add_(piece)

    def start_reduce(self) -> None:
        """Start summing over the group. Parameters no micro-batch touched count as zero."""
        for name in self.parameters.keys() - self._filled:
            for _, view in self._slot_views[name]:
                view.zero_()
        # Narrower weights that were gathered through this buffer are laid out otherwise: they lie in the padding too.
        for view in self._padding:
            view.zero_()
        self._filled.clear()
        self._pending = reduce_scatter_sum(self.shard, self.grads.view(-1), self.group)

    def finish_reduce(self) -> Tensor:
        """This rank's shard [length] of the summed gradients; padding is zero."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending.finish()

    def master(self) -> Tensor:
        """A fresh copy [length] of this rank's pieces of the weights, in at least fp32."""
        segment = torch.zeros_like(self.shard)
        for name, (slot, view) in self.own_views(segment).items():
            local = self.parameters[name].detach()
            view.copy_(local.narrow(slot.dim, slot.start, slot.stop - slot.start))
        return segment

    def start_gather(self, master: Tensor) -> Pending:
        """Send this rank's updated pieces to the group; `finish` writes every rank's pieces into the weights."""
        weights = next(iter(self.parameters.values())).dtype
        # Alone nothing travels: the copy into the weights rounds.
        mine = master if self.group.size == 1 else master.to(weights)
        # The gradient buffer is free between reduce and the next backward, and is at least as wide.
        everyone = self.grads.view(-1).view(weights)[: mine.numel() * self.group.size]
        if self.group.size == 1:
            everyone = mine
        pending = all_gather_into(everyone, mine, self.group)

        def finish() -> Tensor:
            gathered = pending.finish().view(self.group.size, -1)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    for slot, piece in self._views_of(gathered, name):
                        parameter.narrow(slot.dim, slot.start, slot.stop - slot.start).copy_(piece)
            return gathered

        return Pending(finish)
