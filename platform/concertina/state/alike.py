"""How does everybody come to know what all who have state know alike? From one of them; the others compare.

Facts (JSON) and small tensors that are equal on every rank travel to members that have none. Who has its own and finds
it another's stands at another step, and its pieces must not be mixed with theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from concertina.errors import StateError
from concertina.parallel.collectives import all_reduce_max, all_reduce_sum
from concertina.parallel.groups import Group

__all__ = ["Alike", "spread_alike"]

_NOBODY = -(1 << 40)


@dataclass(frozen=True)
class Alike:
    """What the first member that had it says. `fault` is what is wrong with this member's own, if it had any."""

    facts: dict[str, Any]
    tensors: dict[str, bytes]
    fault: str | None

    def write(self, name: str, into: Tensor) -> None:
        """Put tensor `name` into one of its shape and dtype."""
        flat = torch.frombuffer(bytearray(self.tensors[name]), dtype=into.dtype)
        into.copy_(flat.view(into.shape))


def spread_alike(
    own: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None, group: Group, device: torch.device
) -> Alike:
    """Facts and tensors of the first position that has `own`. Every member of the group must call it.

    Raises StateError on every member when nobody has any.
    """
    mine = _packed(*own) if own is not None else b""
    said = [-group.rank if own is not None else _NOBODY, len(mine)]
    found, length = all_reduce_max(torch.tensor(said, device=device), group).finish().tolist()
    if found == _NOBODY:
        raise StateError("no member has state to go on from: begin from a checkpoint", member=group.rank, faults=1)
    vector = torch.zeros(length, dtype=torch.uint8, device=device)
    if group.rank == -found:
        vector[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    heard = bytes(all_reduce_sum(vector, group).finish().cpu().numpy())
    facts, tensors = _unpacked(heard)
    fault = None
    if own is not None and heard.rstrip(b"\0") != mine.rstrip(b"\0"):
        fault = f"position {group.rank} stands at {_brief(dict(own[0]))}, position {-found} at {_brief(facts)}"
    return Alike(facts, tensors, fault)


def _packed(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A line of facts, with the name and length of every tensor; then their bytes, and a last one that is not zero."""
    content = {name: tensor.detach().cpu().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    head = {"facts": facts, "tensors": {name: len(each) for name, each in content.items()}}
    return b"".join([json.dumps(head, sort_keys=True).encode(), b"\n", *content.values(), b"."])


def _unpacked(packed: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    line, _, rest = packed.partition(b"\n")
    head, tensors, offset = json.loads(line), {}, 0
    for name, length in head["tensors"].items():
        tensors[name] = rest[offset : offset + length]
        offset += length
    return head["facts"], tensors


def _brief(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, int | float | str))
