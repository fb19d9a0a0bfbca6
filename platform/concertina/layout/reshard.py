"""What has to move when members change seats, and from whom?

A new holder takes what it already has; else from a holder on its node; else a first owner-to-be takes from the old
first owner and a second from the second, so that both halves of the old holders send alike. The rule looks at one
piece at a time and remembers nothing, so each member works out its own moves without the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concertina.layout.box import Box
from concertina.layout.overlap import Overlaps, overlaps
from concertina.layout.pieces import Cuts, Ints, Ownership, holdings, ownership
from concertina.layout.seating import Seating

if TYPE_CHECKING:
    from concertina.config import ModelConfig

__all__ = ["STATE_TENSORS", "Move", "ReshardPlan", "Traffic", "holdings", "plan_moves"]

STATE_TENSORS = 3
"""What travels of every element: master weight and two moments."""

ABSENT = -1


class Move(NamedTuple):
    """Member `source` gives member `target` all kinds of state of `box`; where both are one, it has them already."""

    name: str
    box: Box
    source: int
    target: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that stay where they are, that travel inside a node, and between nodes."""

    local: int
    same_node: int
    between_nodes: int

    @property
    def moved(self) -> int:
        """Bytes that leave their process."""
        return self.same_node + self.between_nodes

    @property
    def total(self) -> int:
        return self.local + self.moved


@dataclass(frozen=True, eq=False)
class _Rows:
    """The moves of parameters that are cut alike, in canonical order; the same for each of `names`."""

    names: tuple[str, ...]
    start: Ints
    stop: Ints
    source: Ints
    target: Ints

    @cached_property
    def elements(self) -> Ints:
        """Of one parameter, by row."""
        return np.prod(self.stop - self.start, axis=1, dtype=np.int64)


Choice = Callable[[_Rows], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class ReshardPlan:
    """Who sends what to whom. `missing`: (parameter, box) of what no present member holds: with any, nothing can move.

    `moves` are in one order on every member: by parameter, then by the new rank whose piece it is, first owner before
    second, then by the old rank. They are listed when asked for; bytes are counted without.
    """

    names: tuple[str, ...]
    rows: tuple[_Rows, ...]
    missing: tuple[tuple[str, Box], ...]
    nodes: Mapping[int, str]

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """All of them; those with source == target are there already and are copied from the old share to the new."""
        return self._listed(lambda rows: np.ones(len(rows.source), dtype=bool))

    def sent_by(self, member: int) -> tuple[Move, ...]:
        """What `member` sends to others, in order."""
        return self._listed(lambda rows: (rows.source == member) & (rows.target != member))

    def received_by(self, member: int) -> tuple[Move, ...]:
        """What `member` gets from others, in order."""
        return self._listed(lambda rows: (rows.target == member) & (rows.source != member))

    def kept_by(self, member: int) -> tuple[Move, ...]:
        """What `member` has already, in order."""
        return self._listed(lambda rows: (rows.target == member) & (rows.source == member))

    def _listed(self, chosen: Choice) -> tuple[Move, ...]:
        found: dict[str, list[tuple[Box, int, int]]] = {}
        for rows in self.rows:
            where = np.flatnonzero(chosen(rows))
            boxes = [Box(tuple(a), tuple(b)) for a, b in zip(*_lists(where, rows.start, rows.stop), strict=True)]
            listed = list(zip(boxes, *_lists(where, rows.source, rows.target), strict=True))
            found.update(dict.fromkeys(rows.names, listed))
        return tuple(Move(name, *each) for name in self.names for each in found[name])

    def bytes(self, element_size: int) -> Traffic:
        """Of all three kinds of state, with `element_size` bytes an element."""
        local = near = far = 0
        for (source, target), count in self.pairs(element_size).items():
            if source == target:
                local += count
            elif self.nodes[source] == self.nodes[target]:
                near += count
            else:
                far += count
        return Traffic(local, near, far)

    def pairs(self, element_size: int) -> dict[tuple[int, int], int]:
        """Bytes by (source, target), ascending; what stays is under (member, member)."""
        if not any(len(rows.source) for rows in self.rows):
            return {}
        source, target = (np.concatenate([getattr(r, end) for r in self.rows]) for end in ("source", "target"))
        counts = np.concatenate([rows.elements * len(rows.names) for rows in self.rows])
        (sources, s), (targets, t) = (np.unique(ends, return_inverse=True) for ends in (source, target))
        keys, inverse = np.unique(s * len(targets) + t, return_inverse=True)
        sums = np.zeros(len(keys), dtype=np.int64)
        np.add.at(sums, inverse, counts)
        ends = zip(sources[keys // len(targets)].tolist(), targets[keys % len(targets)].tolist(), strict=True)
        return dict(zip(ends, (sums * STATE_TENSORS * element_size).tolist(), strict=True))

    def __str__(self) -> str:
        return _table(self)


def plan_moves(
    model: ModelConfig,
    old: Seating,
    new: Seating,
    present: Collection[int],
    nodes: Mapping[int, str],
    only: int | None = None,
) -> ReshardPlan:
    """How every member of `new` gets its holdings from `present` members that held them in `old`.

    `nodes`: where each present member is. `only`: just the moves from and to this member; `missing` is the world's
    all the same.
    """
    was, will = ownership(model, old.layout), ownership(model, new.layout)
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes.values()))}
    have, want = _Holders.of(old, present, nodes, numbers), _Holders.of(new, new.members, nodes, numbers)
    alike: dict[tuple[int, int], list[str]] = {}
    for name in was.names:
        alike.setdefault((was.index[name], will.index[name]), []).append(name)
    rows = []
    for (old_cuts, new_cuts), names in alike.items():
        before, after = was.cuts[old_cuts], will.cuts[new_cuts]
        common = overlaps(after, before) if only is None else _touching(after, before, have, want, only)
        rows.append(_moves(tuple(names), common, have, want, only))
    lost = np.flatnonzero((have.members == ABSENT).all(axis=0))
    return ReshardPlan(was.names, tuple(rows), _pieces_of(was, lost.tolist()), nodes)


@dataclass(frozen=True, eq=False)
class _Holders:
    """First (row 0) and second (row 1) owner of each rank's pieces, [2, world]: the member, and its node's number."""

    members: Ints
    nodes: Ints

    @classmethod
    def of(
        cls, seating: Seating, present: Collection[int], nodes: Mapping[int, str], numbers: Mapping[str, int]
    ) -> _Holders:
        here = set(present)
        first = [member if member in here else ABSENT for member in seating.members]
        seconds = [ABSENT if rank is None else first[rank] for rank in seating.seconds]
        places = [ABSENT if member == ABSENT else numbers[nodes[member]] for member in first]
        second_places = [ABSENT if rank is None else places[rank] for rank in seating.seconds]
        return cls(np.array([first, seconds]), np.array([places, second_places]))

    def ranks_of(self, member: int) -> list[int]:
        """The ranks whose pieces `member` holds."""
        return np.flatnonzero((self.members == member).any(axis=0)).tolist()


def _touching(after: Cuts, before: Cuts, have: _Holders, want: _Holders, member: int) -> Overlaps:
    """What overlaps with something that `member` has or wants, each pair of pieces once."""
    boxes = [after.box(rank) for rank in want.ranks_of(member)] + [before.box(rank) for rank in have.ranks_of(member)]
    found = Overlaps.joined([overlaps(after, before, box) for box in boxes if box.size], after.start.shape[1])
    _, once = np.unique(found.ranks_a * have.members.shape[1] + found.ranks_b, return_index=True)
    return found.take(once)


def _moves(names: tuple[str, ...], common: Overlaps, have: _Holders, want: _Holders, only: int | None) -> _Rows:
    """From whom each holder-to-be takes each overlap, in canonical order."""
    sources, targets = (np.full((2, len(common.ranks_a)), ABSENT) for _ in range(2))
    for role in (0, 1):
        targets[role] = want.members[role, common.ranks_a]
        sources[role] = _sources(common, have, targets[role], want.nodes[role, common.ranks_a], role)
    keep = (targets != ABSENT) & (sources != ABSENT)
    if only is not None:
        keep &= (targets == only) | (sources == only)
    roles, rows = np.nonzero(keep)
    order = np.lexsort((common.ranks_b[rows], roles, common.ranks_a[rows]))
    roles, rows = roles[order], rows[order]
    return _Rows(names, common.start[rows], common.stop[rows], sources[roles, rows], targets[roles, rows])


def _sources(common: Overlaps, have: _Holders, target: Ints, node: Ints, role: int) -> Ints:
    """The best of the two holders of each overlap for its target; ABSENT where neither is present."""
    holders, places = have.members[:, common.ranks_b], have.nodes[:, common.ranks_b]
    worth = np.where(holders == ABSENT, 0, 1 + (places == node) + 2 * (holders == target))
    other = 1 - role
    return np.where(worth[other] > worth[role], holders[other], holders[role])


def _pieces_of(table: Ownership, ranks: list[int]) -> tuple[tuple[str, Box], ...]:
    boxes = [[box for rank in ranks if (box := cuts.box(rank)).size] for cuts in table.cuts]
    return tuple((name, box) for name, index in table.index.items() for box in boxes[index]) if ranks else ()


def _lists(where: Ints, *arrays: Ints) -> list[list]:
    return [array[where].tolist() for array in arrays]


def _table(plan: ReshardPlan, element_size: int = 4, most: int = 16) -> str:
    """A line for each of the members that move most, then the sum, in MB of fp32 state."""
    kept: dict[int, int] = {}
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for (source, target), count in plan.pairs(element_size).items():
        for book, member in ((kept, source),) if source == target else ((sent, source), (received, target)):
            book[member] = book.get(member, 0) + count
    members = sorted({*kept, *sent, *received}, key=lambda m: (-sent.get(m, 0) - received.get(m, 0), m))
    lines = [f"{'member':>8} {'node':<12} {'kept MB':>10} {'sent MB':>10} {'received MB':>12}"]
    for member in members[:most]:
        kept_mb, sent_mb, received_mb = (book.get(member, 0) / 1e6 for book in (kept, sent, received))
        lines.append(f"{member:>8} {plan.nodes[member]:<12} {kept_mb:>10.1f} {sent_mb:>10.1f} {received_mb:>12.1f}")
    if len(members) > most:
        lines.append(f"     ... {len(members) - most} more")
    total = plan.bytes(element_size)
    lines.append(
        f"{total.local / 1e6:.1f} MB stay, {total.same_node / 1e6:.1f} MB move inside nodes, "
        f"{total.between_nodes / 1e6:.1f} MB between nodes"
    )
    if plan.missing:
        names = ", ".join(dict.fromkeys(name for name, _ in plan.missing[:3]))
        lines.append(f"{len(plan.missing)} pieces are lost: {names} ...")
    return "\n".join(lines)
