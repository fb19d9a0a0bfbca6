"""Does a plan bring every holder all it wants, once, from who has it, and from near by where it can?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from concertina.config import ModelConfig
from concertina.elastic.second_owners import place_seconds
from concertina.layout import Box, Layout, Seating, shards
from concertina.layout.pieces import holdings, pieces
from concertina.layout.reshard import STATE_TENSORS, Move, ReshardPlan, plan_moves
from tests.layout.small_models import EVEN, MODELS, ODD, layouts_of

pytestmark = pytest.mark.unit

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Members change seats; who is not in `present` is lost."""

    model: ModelConfig
    old: Seating
    new: Seating
    present: frozenset[int]
    nodes: dict[int, str]

    def held(self) -> dict[int, dict[str, list[Box]]]:
        """What the old share of each present member has."""
        return _held(self.model, self.old, self.present)

    def plan(self, only: int | None = None) -> ReshardPlan:
        here = {member: self.nodes[member] for member in {*self.present, *self.new.roster}}
        return plan_moves(self.model, self.old, self.new, self.present, here, only)


@lru_cache(maxsize=2)
def _held(model: ModelConfig, old: Seating, present: frozenset[int]) -> dict[int, dict[str, list[Box]]]:
    return {member: holdings(model, old, member) for member in present}


def seated(layout: Layout, members: list[int], nodes: dict[int, str]) -> Seating:
    return Seating(layout, tuple(members), place_seconds([nodes[member] for member in members]))


@st.composite
def cases(draw: st.DrawFn, most_lost: int = 1) -> Case:
    """Any two layouts of up to eight ranks; members on any nodes, in any seats; some lost, some new."""
    model = draw(st.sampled_from(list(MODELS.values())))
    before, after = draw(layouts_of(model, 8)), draw(layouts_of(model, 8))
    nodes = {member: draw(st.sampled_from("abc")) for member in range(before.world + after.world)}
    members = draw(st.permutations(range(before.world)))
    old = seated(before, members, nodes)
    lost = draw(st.sets(st.sampled_from(members), max_size=min(most_lost, before.world - 1)))
    free = [member for member in nodes if member not in lost]
    assume(len(free) >= after.world)
    new = seated(after, draw(st.permutations(free))[: after.world], nodes)
    return Case(model, old, new, frozenset(set(members) - lost), nodes)


def whole(model: ModelConfig) -> Arrays:
    """Every parameter with numbers that stand nowhere else."""
    shapes = {name: shard.global_shape for name, shard in shards(model, Layout(1), 0).items()}
    starts = np.cumsum([0, *(np.prod(shape) for shape in shapes.values())])
    return {
        name: np.arange(start, start + np.prod(shape)).reshape(shape)
        for start, (name, shape) in zip(starts, shapes.items(), strict=False)
    }


def after_moves(case: Case, moves: Collection[Move]) -> None:
    """Carry the moves out between arrays that hold nothing but what a member has, and look at what each then has."""
    truth = whole(case.model)
    has: dict[int, dict[str, list[tuple[Box, np.ndarray]]]] = {}
    for member, held in case.held().items():
        has[member] = {name: [(box, truth[name][box.slices()]) for box in boxes] for name, boxes in held.items()}
    got = {member: {name: np.full(a.shape, -1) for name, a in truth.items()} for member in case.new.members}
    for move in moves:
        there = [(box, array) for box, array in has[move.source].get(move.name, []) if box.contains(move.box)]
        assert there, f"{move.source} does not hold {move}"
        into = got[move.target][move.name][move.box.slices()]
        assert (into == -1).all(), f"{move} comes twice"
        into[...] = there[0][1][move.box.slices(within=there[0][0])]
    for member in case.new.members:
        wanted = {name: np.full(array.shape, -1) for name, array in truth.items()}
        for name, boxes in holdings(case.model, case.new, member).items():
            for box in boxes:
                wanted[name][box.slices()] = truth[name][box.slices()]
        assert all((got[member][name] == wanted[name]).all() for name in truth), f"{member} has not what it wants"


def holders(case: Case, move: Move) -> set[int]:
    """Present members that have all of a move's box."""
    held = case.held()
    return {m for m in case.present if any(box.contains(move.box) for box in held[m].get(move.name, []))}


@settings(max_examples=50)
@given(cases())
def test_everybody_has_what_it_wants_whoever_is_lost(case: Case) -> None:
    assume(len(case.old.members) > 1 or case.present)
    plan = case.plan()
    lost = set(case.old.members) - case.present
    alone = case.old.layout.world == 1
    assert not plan.missing or (lost and alone)
    after_moves(case, plan.moves)


@settings(max_examples=50)
@given(cases())
def test_what_is_near_is_taken_from_near(case: Case) -> None:
    for move in case.plan().moves:
        able = holders(case, move)
        if move.target in able:
            assert move.source == move.target
        elif any(case.nodes[member] == case.nodes[move.target] for member in able):
            assert case.nodes[move.source] == case.nodes[move.target]


@settings(max_examples=50)
@given(cases(most_lost=3))
def test_a_members_own_plan_is_its_part_of_the_whole(case: Case) -> None:
    plan = case.plan()
    for member in {*case.present, *case.new.members}:
        own = case.plan(only=member)
        assert own.moves == tuple(move for move in plan.moves if member in (move.source, move.target))
        assert own.missing == plan.missing
        assert own.sent_by(member) == plan.sent_by(member)
        assert own.received_by(member) == plan.received_by(member)
        assert own.kept_by(member) == plan.kept_by(member)


@settings(max_examples=50)
@given(cases(most_lost=4))
def test_missing_is_exactly_what_nobody_present_holds(case: Case) -> None:
    kept = {name: np.zeros(array.shape, dtype=int) for name, array in whole(case.model).items()}
    missing = {name: np.zeros_like(array) for name, array in kept.items()}
    for held in case.held().values():
        for name, boxes in held.items():
            for box in boxes:
                kept[name][box.slices()] = 1
    plan = case.plan()
    for name, box in plan.missing:
        missing[name][box.slices()] += 1
    assert all((missing[name] == 1 - kept[name]).all() for name in kept)
    if plan.missing:
        with pytest.raises(AssertionError, match="has not what it wants"):
            after_moves(case, plan.moves)


@settings(max_examples=50)
@given(cases(), st.data())
def test_a_plan_with_a_move_left_out_doubled_or_from_elsewhere_is_seen(case: Case, data: st.DataObject) -> None:
    moves = list(case.plan().moves)
    assume(moves)
    where = data.draw(st.integers(0, len(moves) - 1))
    with pytest.raises(AssertionError):
        after_moves(case, moves[:where] + moves[where + 1 :])
    with pytest.raises(AssertionError, match="comes twice"):
        after_moves(case, [*moves, moves[where]])
    strangers = case.present - holders(case, moves[where])
    if strangers:
        moves[where] = moves[where]._replace(source=min(strangers))
        with pytest.raises(AssertionError, match="does not hold"):
            after_moves(case, moves)


FOUR = {0: "a", 1: "a", 2: "b", 3: "b"}


def test_a_fresh_start_fills_the_second_copies() -> None:
    layout = Layout(4, ep=2)
    filled = seated(layout, [0, 1, 2, 3], FOUR)
    case = Case(EVEN, replace(filled, seconds=(None,) * 4), filled, frozenset(FOUR), FOUR)
    plan = case.plan()
    after_moves(case, plan.moves)
    assert {(move.source, move.target) for move in plan.moves if move.source != move.target} == {
        (0, 2),
        (1, 3),
        (2, 0),
        (3, 1),
    }
    traffic = plan.bytes(4)
    elements = sum(array.size for array in whole(EVEN).values())
    assert traffic.local == traffic.between_nodes == elements * 4 * STATE_TENSORS
    assert traffic.same_node == 0


def test_nothing_moves_where_nothing_changes() -> None:
    seating = seated(Layout(4, ep=2), [0, 1, 2, 3], FOUR)
    plan = Case(ODD, seating, seating, frozenset(FOUR), FOUR).plan()
    assert plan.bytes(4).moved == 0
    assert plan.bytes(4).local == 2 * 12 * sum(array.size for array in whole(ODD).values())


def test_who_takes_a_lost_members_seat_takes_its_state_and_nobody_else_moves() -> None:
    nodes = {**FOUR, 4: "b"}
    old, new = (seated(Layout(4, ep=2), members, nodes) for members in ([0, 1, 2, 3], [0, 1, 2, 4]))
    case = Case(ODD, old, new, frozenset({0, 1, 2}), nodes)
    assert {move.target for move in case.plan().moves if move.source != move.target} == {4}
    after_moves(case, case.plan().moves)


def test_two_lost_nodes_of_a_pair_lose_their_pieces_and_of_two_pairs_none() -> None:
    nodes = {member: "abcd"[member // 2] for member in range(8)}
    old = seated(Layout(8, ep=4), list(range(8)), nodes)
    pair = {nodes[0], nodes[old.members[old.seconds[0] or 0]]}
    assert pair == {"a", "b"}
    new = seated(Layout(4, ep=2), [4, 5, 6, 7], nodes)
    missing = Case(ODD, old, new, frozenset({4, 5, 6, 7}), nodes).plan().missing
    expected = {(name, box) for rank in range(4) for name, box in pieces(ODD, old.layout, rank).items()}
    assert set(missing) == expected
    assert len(missing) == len(expected)
    survivors = seated(Layout(4, ep=2), [2, 3, 6, 7], nodes)
    case = Case(ODD, old, survivors, frozenset({2, 3, 6, 7}), nodes)
    assert case.plan().missing == ()
    after_moves(case, case.plan().moves)


def test_both_halves_of_the_holders_send_when_all_is_far() -> None:
    """Ranks that all leave for new nodes: each old first and second owner sends its piece once."""
    nodes = {member: f"{'old' if member < 4 else 'new'}{member}" for member in range(8)}
    old = seated(Layout(4, ep=4), [0, 1, 2, 3], nodes)
    new = seated(Layout(4, ep=4), [4, 5, 6, 7], nodes)
    case = Case(EVEN, old, new, frozenset({0, 1, 2, 3}), nodes)
    sent = {member: sum(move.box.size for move in case.plan().sent_by(member)) for member in range(4)}
    assert max(sent.values()) <= 1.1 * min(sent.values())
    after_moves(case, case.plan().moves)


def test_bytes_by_pair_and_in_all_are_those_of_the_moves() -> None:
    old = seated(Layout(4, ep=2), [0, 1, 2, 3], FOUR)
    case = Case(ODD, old, seated(Layout(3, ep=3), [1, 0, 3], FOUR), frozenset({0, 1, 3}), FOUR)
    plan = case.plan()
    pairs: dict[tuple[int, int], int] = {}
    for move in plan.moves:
        pairs[move.source, move.target] = pairs.get((move.source, move.target), 0) + 24 * move.box.size
    assert plan.pairs(8) == pairs
    assert list(plan.pairs(8)) == sorted(pairs)
    traffic = plan.bytes(8)
    assert traffic.total == sum(pairs.values())
    assert traffic.same_node == sum(n for (a, b), n in pairs.items() if a != b and FOUR[a] == FOUR[b])
    assert traffic.between_nodes == sum(n for (a, b), n in pairs.items() if FOUR[a] != FOUR[b])
    assert "MB move inside nodes" in str(plan)
    assert str(plan).splitlines()[0].split() == ["member", "node", "kept", "MB", "sent", "MB", "received", "MB"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(16, tp=2, ep=4), Layout(12, tp=4, ep=2)),
        (Layout(12, cp=2, tp=2, ep=2, etp=2), Layout(15, ep=5)),
        (Layout(16, pp=2, tp=2, ep=4), Layout(12, cp=3)),
    ],
)
def test_larger_worlds_of_other_degrees(before: Layout, after: Layout) -> None:
    nodes = {member: f"n{member // 4}" for member in range(20)}
    old = seated(before, list(range(before.world)), nodes)
    new = seated(after, list(range(3, 3 + after.world)), nodes)
    case = Case(ODD, old, new, frozenset(range(3, before.world)), nodes)
    assert not case.plan().missing
    after_moves(case, case.plan().moves)
