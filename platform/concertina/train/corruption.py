"""Has a rank's memory changed without anybody computing it? Copies that must be equal to the bit are compared.

Weights are held alike by all replicas of a bucket; first and second owner hold the same masters and moments. Sums of
their bits are exchanged, a few numbers a rank. A step whose weights were not what they should be is applied by nobody.
Whose weights differ from the others' is named. Of two copies nothing says which is right: then the masters tell, which
the weights were rounded from; and where first and second owner differ in those, nobody is named.

Source: the checks of replicas that Llama 3 (2024, section 3.3.4) and ByteRobust (2025) ask for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.errors import ConcertinaError
from concertina.parallel.collectives import all_gather_into, all_reduce_sum
from concertina.parallel.groups import Group
from concertina.parallel.zero import Bucket
from concertina.train.adamw import FlatAdamW
from concertina.train.share import Share

__all__ = ["Findings", "SilentCorruption", "corrupt", "culprits", "find_corruption"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: equal changes in two tensors do not cancel


@dataclass(frozen=True)
class Findings:
    """Ranks whose copies are wrong; and ranks of whose shards copies differ and nobody knows which is right."""

    named: tuple[int, ...] = ()
    unclear: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.named or self.unclear)


class SilentCorruption(ConcertinaError):
    """Copies that must be equal are not, and the step is not applied. `mine`: this rank's are wrong; `known`: all that
    is wrong is named, and the others can go on without it."""

    def __init__(self, message: str, mine: bool = False, known: bool = False) -> None:
        super().__init__(message, mine=mine, known=known)
        self.mine, self.known = mine, known

    @classmethod
    def of(cls, findings: Findings, step: int, rank: int) -> SilentCorruption:
        """As `rank` says it."""
        at = f"silent corruption, seen before step {step} was applied"
        if findings.unclear:
            ranks = ", ".join(map(str, findings.unclear))
            text = f"{at}: copies of what rank {ranks} owns differ, and nothing says which is right: resume the run"
            return cls(text, mine=rank in findings.named)
        ranks = ", ".join(map(str, findings.named))
        return cls(f"{at}: weights of rank {ranks} are not those of its replicas", rank in findings.named, known=True)


def bits(x: Tensor) -> Tensor:
    """The sum of its elements' bits as integers, int64 scalar: any one bit that flips changes it."""
    return x.detach().contiguous().view(_BITS[x.element_size()]).sum(dtype=torch.int64)


def find_corruption(share: Share) -> Findings:
    """What is wrong, the same on every rank. Collective over the world; the weights of the last applied step are there,
    the next one is not applied."""
    world = share.groups.world
    share.optimizer.arrive()
    mine = odd = False
    for group, weights, masters in _sums_by_group(share.optimizer.buckets, share.optimizer):
        table = _gathered(torch.cat([weights, masters]), group)
        named, unclear = culprits(table[:, :-1].tolist(), table[:, -1].tolist())
        mine, odd = mine or group.rank in named, odd or unclear
    votes = torch.zeros(3, world.size, dtype=torch.int64, device=share.optimizer.masters[0].device)
    votes[0, share.rank], votes[1, share.rank] = int(mine), int(odd)
    if share.seconds.to is not None:
        votes[2, share.rank] += _state_bits(share.optimizer)
    for first, copy in share.seconds.copies.items():
        votes[2, first] -= _state_bits(copy)
    named, unclear, differ = all_reduce_sum(votes, world).finish()
    culprit = named > 0
    return Findings(
        named=tuple(culprit.nonzero().flatten().tolist()),
        unclear=tuple(((unclear > 0) | ((differ != 0) & ~culprit)).nonzero().flatten().tolist()),
    )


def culprits(weights: Sequence[Sequence[int]], masters: Sequence[int]) -> tuple[set[int], bool]:
    """Positions of a group whose weights are wrong, and whether some are wrong that nobody can name.

    `weights[p][s]` sums what position p holds of shard s, `masters[s]` what its owner's masters round to.
    """
    size, named, odd = len(weights), set[int](), False
    for shard in range(size):
        held = [weights[position][shard] for position in range(size)]
        (value, votes), *_ = Counter(held).most_common()
        if votes == size:
            if value != masters[shard]:
                named.add(shard)  # its own masters are not what it sent everybody
            continue
        right = value if 2 * votes > size else masters[shard] if masters[shard] in held else None
        if right is None:
            odd = True
        else:
            named.update(position for position in range(size) if held[position] != right)
    return named, odd


def _sums_by_group(buckets: Sequence[Bucket], optimizer: FlatAdamW) -> list[tuple[Group, Tensor, Tensor]]:
    """Of each group with replicas, in one order on all its ranks: sums of the shards in this rank's weights [size], and
    of what its own masters round to [1]."""
    found: dict[str, tuple[Group, Tensor, Tensor]] = {}
    for bucket, master in zip(buckets, optimizer.masters, strict=True):
        group = bucket.group
        if group.size == 1:
            continue
        zeros = torch.zeros(group.size + 1, dtype=torch.int64, device=master.device)
        _, weights, masters = found.setdefault(group.name, (group, zeros[:-1], zeros[-1:]))
        weights.mul_(_MIX)
        masters.mul_(_MIX)
        for rank, slots in enumerate(bucket.slots):
            for name, slot in slots.items():
                if slot.numel:
                    weights[rank] += bits(bucket.parameters[name].narrow(slot.dim, slot.start, slot.stop - slot.start))
        for name, (_, piece) in bucket.own_views(master.detach()).items():
            masters += bits(piece.to(bucket.parameters[name].dtype))
    return [found[name] for name in sorted(found)]


def corrupt(share: Share) -> None:
    """On purpose, for tests and `concertina chaos`: a low bit of one weight that others hold as well flips."""
    bucket = next((bucket for bucket in share.optimizer.buckets if bucket.group.size > 1), share.optimizer.buckets[0])
    weight = next(iter(bucket.parameters.values()))
    with torch.no_grad():
        weight.view(-1)[:1].view(_BITS[weight.element_size()]).bitwise_xor_(1)


def _gathered(sums: Tensor, group: Group) -> Tensor:
    """[size, len(sums)]"""
    table = sums.new_empty(group.size * len(sums))
    all_gather_into(table, sums, group).finish()
    return table.view(group.size, -1)


def _state_bits(owner: FlatAdamW) -> Tensor:
    """Of masters and moments."""
    total = torch.zeros((), dtype=torch.int64, device=owner.masters[0].device)
    for _, kinds in owner.views().values():
        for tensor in kinds:
            total = total * _MIX + bits(tensor)
    return total
