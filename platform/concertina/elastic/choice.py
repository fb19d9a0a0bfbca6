"""Which layout does a run take on the members it has, and who sits where?

Pure: the same members and the same old seating give the same answer wherever they are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise, product
from math import lcm, log2
from typing import TYPE_CHECKING

from concertina.elastic.second_owners import place_seconds
from concertina.errors import CapacityError
from concertina.layout import Layout, Seating, check_job, fits, layout_with
from concertina.layout.refusals import divisors

if TYPE_CHECKING:
    from concertina.config import Job

__all__ = ["choose_layout", "seat", "take_seats"]

CHOSEN = ("pp", "tp", "cp", "etp", "ep")
"""Axes that are chosen, the weightiest first: pp decides how the model is cut into stages, tp and etp cut heads and
widths, cp cuts sequences, ep only deals experts out."""


def choose_layout(job: Job, members: int) -> tuple[Layout, str]:
    """The layout of the largest world that fits the job and has at most `members` ranks, and why it is that one.

    Never more ranks than `cluster.num_workers`. Of the layouts of that world, the one whose degrees are the job's; else
    the nearest below them (fewer cuts need less exchange, and more replicas), above them only where nothing else fits,
    and never more pipeline stages or chunks of a sequence.
    Memory is not looked at. Raises CapacityError without members, LayoutError where no world fits.
    """
    most = min(members, job.cluster.num_workers)
    if most < 1:
        raise CapacityError("no member is left to train on: add nodes and resume", members=members)
    wanted = job.layout.degrees
    for world in range(most, 0, -1):
        degrees = _nearest(job, world, wanted)
        if degrees is not None:
            layout = layout_with(job, world, degrees)
            return layout, _why(layout, wanted, most, members)
    uncut = {**dict.fromkeys(CHOSEN, 1), "virtual_stages": 1, "stage_layers": None}
    alone = {"layout": job.layout.model_copy(update=uncut)}
    check_job(job.model_copy(update={**alone, "cluster": job.cluster.model_copy(update={"num_workers": 1})}))
    raise AssertionError("what one rank can train was not found")


def _nearest(job: Job, world: int, wanted: Mapping[str, int]) -> dict[str, int] | None:
    """The degrees of `world` ranks that are nearest to the wanted ones, by the weight of axes; None where none fit."""
    by_distance = {axis: sorted(divisors(world), key=lambda value: _distance(value, wanted[axis])) for axis in CHOSEN}
    for axis in ("pp", "cp"):
        by_distance[axis] = [value for value in by_distance[axis] if value <= wanted[axis]]
    alone = dict.fromkeys(CHOSEN, 1)
    # Both grids are bound by the stage, the batch sees attention's alone: what experts refuse is found after it.
    for pp, tp, cp in product(*(by_distance[axis] for axis in ("pp", "tp", "cp"))):
        if world % (pp * tp * cp) or not fits(job, world, {**alone, "pp": pp, "tp": tp, "cp": cp}):
            continue
        for etp, ep in product(by_distance["etp"], by_distance["ep"]):
            degrees = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
            if not world // pp % (etp * ep) and fits(job, world, degrees):
                return degrees
    return None


def _distance(value: int, wanted: int) -> tuple[bool, float]:
    return value > wanted, abs(log2(value / wanted))


def _why(layout: Layout, wanted: Mapping[str, int], most: int, members: int) -> str:
    """`world 3 (dp 3, tp 1, ep 1, etp 1): all 3 members; ep=2 does not fit`."""
    shown = [axis for axis in CHOSEN if axis not in ("pp", "cp") or max(wanted[axis], layout.degrees[axis]) > 1]
    degrees = ", ".join(f"{axis} {layout.degrees[axis]}" for axis in ("dp", *shown))
    reasons = [f"all {members} members" if most == members else f"the job's {most} of {members} members"]
    if layout.world < most:
        reasons = [f"the largest that model and batch fit, of {most}"]
    reasons += [f"{axis}={wanted[axis]} does not fit" for axis in CHOSEN if getattr(layout, axis) != wanted[axis]]
    return f"world {layout.world} ({degrees}): {'; '.join(reasons)}"


def seat(job: Job, nodes: Mapping[int, str], old: Seating | None, leaving: Collection[int] = frozenset()) -> Seating:
    """The seating of the members in `nodes` (member -> node) under the layout that those can have who stay. Who is
    `leaving` hands over what it has, and gets no rank: it is the last of the spares.

    Raises what `choose_layout` raises, and CapacityError when nobody stays.
    """
    staying = {member: node for member, node in nodes.items() if member not in leaving}
    if not staying:
        raise CapacityError(f"all {len(nodes)} members are on nodes that are taken back")
    found = take_seats(choose_layout(job, len(staying))[0], staying, old)
    return replace(found, spares=(*found.spares, *sorted(nodes.keys() - staying.keys())))


def take_seats(layout: Layout, nodes: Mapping[int, str], old: Seating | None) -> Seating:
    """Seat `layout.world` of the members in `nodes`, the others are spares; second owners as `place_seconds` has them.

    Who held a rank keeps it where the layout stays and newcomers can fill the gaps; else ranks keep their order and
    newcomers come after them. Ranks of a node are neighbours, so that lanes of tp and etp stay inside it.
    """
    assert len(nodes) >= layout.world, (layout, nodes)
    order, block = _in_order(nodes, old), lcm(layout.tp, layout.etp)
    chosen = _chosen(layout.world, block, order, nodes, old)
    ranks_of = Counter(nodes[member] for member in chosen)
    # Nodes of whole blocks first: what a broken one leaves over would shift the lanes of all after it.
    seats = sorted((m for m in order if m in chosen), key=lambda m: ranks_of[nodes[m]] % block > 0)
    if old is not None and old.layout == layout:
        kept = _in_old_seats(seats, nodes, old)
        if _scattered(kept, block, nodes) <= _scattered(seats, block, nodes):
            seats = kept
    spares = tuple(member for member in order if member not in chosen)
    return Seating(layout, tuple(seats), place_seconds([nodes[member] for member in seats]), spares)


def _in_order(nodes: Mapping[int, str], old: Seating | None) -> list[int]:
    """All members: nodes by their first rank (those without one after, by their first member), ranks in order."""

    def key(member: int) -> tuple[bool, int]:
        rank = None if old is None else old.rank_of(member)
        return (True, member) if rank is None else (False, rank)

    first: dict[str, tuple[bool, int]] = {}
    for member in nodes:
        first[nodes[member]] = min(first.get(nodes[member], (True, member)), key(member))
    return sorted(nodes, key=lambda member: (first[nodes[member]], key(member)))


def _chosen(world: int, block: int, order: list[int], nodes: Mapping[int, str], old: Seating | None) -> set[int]:
    """Who gets a rank: who has state before who has none, then who fills up whole blocks of lanes in a node."""
    members_of = Counter(nodes[member] for member in order)
    seen: Counter[str] = Counter()
    keys: dict[int, tuple[bool, bool, int]] = {}
    for place, member in enumerate(order):
        node = nodes[member]
        newcomer = old is None or old.rank_of(member) is None
        keys[member] = (newcomer, seen[node] >= members_of[node] // block * block, place)
        seen[node] += 1
    return set(sorted(order, key=keys.__getitem__)[:world])


def _in_old_seats(seats: list[int], nodes: Mapping[int, str], old: Seating) -> list[int]:
    """Who had a rank keeps it, the others fill the gaps: best on the node of the rank before or after."""
    at = {rank: member for member in seats if (rank := old.rank_of(member)) is not None}
    waiting: dict[str, list[int]] = {}
    for member in seats:
        if old.rank_of(member) is None:
            waiting.setdefault(nodes[member], []).append(member)
    for rank in range(old.layout.world):
        if rank not in at:
            beside = [nodes[at[near]] for near in (rank - 1, rank + 1) if near in at]
            node = next((node for node in beside if waiting.get(node)), next(n for n, who in waiting.items() if who))
            at[rank] = waiting[node].pop(0)
    return [at[rank] for rank in range(old.layout.world)]


def _scattered(seats: list[int], block: int, nodes: Mapping[int, str]) -> tuple[int, int]:
    """Blocks of lanes that more than one node has, and how often the node changes from rank to rank."""
    on = [nodes[member] for member in seats]
    split = sum(len({*on[first : first + block]}) > 1 for first in range(0, len(on), block))
    return split, sum(a != b for a, b in pairwise(on))
