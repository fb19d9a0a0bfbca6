"""Does each transition of the state machine between generations give the orders it should? Each by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from concertina.elastic.generations import Generations, Order, OrderKind, Restore
from concertina.elastic.messages import Halted
from tests.elastic.simulated_run import seats

pytestmark = pytest.mark.unit

HALT, PREPARE, STOP, MOVE, KEEP, RESTORE = (
    OrderKind.HALT,
    OrderKind.PREPARE,
    OrderKind.STOP,
    OrderKind.MOVE,
    OrderKind.KEEP,
    OrderKind.RESTORE,
)


def said(member: int, generation: int, step: int, answers: int = 99, **other: object) -> Halted:
    plain = Halted(member, answers, generation, -1, step, None, None, [], 0, "")
    return replace(plain, **other)  # type: ignore[arg-type]


def kinds(orders: list[Order]) -> list[OrderKind]:
    return [order.kind for order in orders]


def form(generations: Generations, number: int) -> None:
    assert generations.coming is not None
    formed = [generations.form(member, number) for member in generations.coming.seating.roster]
    assert formed == [False] * (len(formed) - 1) + [True]


def trained(members: int) -> Generations:
    """Generation 0 of so many members trains, each on a node of its own."""
    generations = Generations(seats)
    for member in range(members):
        generations.arrive(member, f"node {member}")
    assert kinds(generations.begin()) == [PREPARE, RESTORE]
    assert kinds(generations.restore(Restore())) == [MOVE]
    form(generations, 0)
    assert generations.is_settled
    return generations


def lose_both_owners(generations: Generations) -> list[int]:
    """Of the first rank; the two that are left."""
    seating = generations.seating
    assert seating is not None
    second = seating.seconds[0]
    assert second is not None
    generations.lose([seating.members[0], seating.members[second]])
    return sorted(generations.present)


# -- each transition --------------------------------------------------------------------------------------------------


def test_a_loss_halts_who_is_left_and_the_newest_step_is_completed() -> None:
    generations = trained(4)
    orders = generations.lose([3])
    assert [(order.kind, order.number, set(order.members)) for order in orders] == [
        (HALT, 1, {0, 1, 2}),
        (PREPARE, 1, {0, 1, 2}),
    ]
    assert generations.halt(said(0, 0, 7, pending=8)) == []
    assert generations.halt(said(1, 0, 8, totals=[1.0])) == []
    (order,) = generations.halt(said(2, 0, 7, pending=8))
    assert order.kind is MOVE
    assert order.move is not None
    assert (order.move.source, order.move.step, order.move.totals, order.move.present) == (0, 8, [1.0], [0, 1, 2])
    form(generations, 1)
    assert generations.possible.keys() == {1}


def test_what_was_said_before_a_move_that_was_overtaken_is_asked_again() -> None:
    generations = trained(5)
    generations.lose([4])
    for member in range(4):
        orders = generations.halt(said(member, 0, 7, answers=1))
    assert kinds(orders) == [MOVE]
    assert kinds(generations.lose([3])) == [HALT, PREPARE]
    for member in range(3):
        assert generations.halt(said(member, 0, 7, answers=1)) == []
    generations.halt(said(0, 1, 7, answers=2))
    generations.halt(said(1, 0, 7, answers=2, verified=1))
    (order,) = generations.halt(said(2, 0, 7, answers=2, verified=1))
    assert order.move is not None
    assert (order.move.source, order.move.present) == (1, [0, 1, 2])


def test_a_spare_that_let_go_knows_that_all_have_verified() -> None:
    generations = trained(4)
    generations.lose([3])  # three are left: one becomes a spare
    for member in range(3):
        generations.halt(said(member, 0, 7))
    coming = generations.coming
    assert coming is not None
    (spare,) = coming.seating.spares
    generations.lose([coming.seating.members[0]])
    (left,) = set(generations.present) - {spare}
    generations.arrive(9, "node 9")
    generations.begin()
    generations.halt(said(spare, 1, 7))
    (order,) = generations.halt(said(left, 0, 7, verified=1))
    assert order.move is not None
    assert (order.move.source, order.move.step, order.move.present) == (1, 7, [left])


def test_without_both_owners_of_a_rank_the_state_is_given_up() -> None:
    generations = trained(4)
    left = lose_both_owners(generations)
    generations.halt(said(left[0], 0, 7))
    assert kinds(generations.halt(said(left[1], 0, 7))) == [RESTORE]
    (order,) = generations.restore(Restore("checkpoint", 5))
    assert order.move is not None
    assert (order.move.source, order.move.checkpoint, order.move.step) == (None, "checkpoint", 5)
    assert generations.possible.keys() == {1}


def test_each_time_the_state_is_given_up_the_checkpoint_is_asked_for_anew() -> None:
    generations = Generations(seats)
    generations.arrive(0, "node 0")
    generations.arrive(1, "node 1")
    generations.begin()
    generations.restore(Restore())
    generations.lose([0, 1])  # they may have trained for hours: Formed was still under way
    generations.arrive(2, "node 2")
    generations.arrive(3, "node 3")
    assert kinds(generations.begin()) == [PREPARE, RESTORE]


def test_a_planned_change_stops_the_world_when_all_are_prepared_and_waits_for_no_spare() -> None:
    generations = trained(3)
    assert generations.seating is not None
    ranks, (spare,) = generations.seating.members, generations.seating.spares
    generations.arrive(3, "node 3")
    assert kinds(generations.begin(planned=True)) == [PREPARE]
    orders = [order for member in range(4) for order in generations.prepare(member, 1)]
    assert [(order.kind, order.members) for order in orders] == [(STOP, ranks[:1])]
    assert not generations.trains
    orders = [order for member in ranks for order in generations.halt(said(member, 0, 7, answers=-1))]
    assert kinds(orders) == [MOVE]
    assert spare not in generations.reports


def test_who_only_prepares_or_waits_stops_nobody_when_it_is_lost() -> None:
    generations = trained(3)
    assert generations.seating is not None
    (spare,) = generations.seating.spares
    generations.arrive(3, "node 3")
    generations.begin(planned=True)
    assert generations.lose([3]) == []
    assert generations.is_settled, "what was planned is called off"
    form_nothing = generations.form(0, 1)
    assert not form_nothing
    settled = trained(3)
    assert settled.lose([spare]) == []
    assert settled.trains


def test_a_planned_change_goes_on_when_the_world_has_stopped_before_it_is_asked() -> None:
    generations = trained(2)
    generations.arrive(2, "node 2")
    generations.arrive(3, "node 3")
    generations.begin(planned=True)
    for member in (0, 1):
        assert generations.halt(said(member, 0, 7, failure="network")) == []
    assert generations.is_stuck
    orders = [order for member in range(4) for order in generations.prepare(member, 1)]
    assert kinds(orders) == [STOP, MOVE]


def test_one_that_complains_while_the_world_is_to_stop_is_heard() -> None:
    """The others may wait for what never comes."""
    generations = trained(2)
    generations.arrive(2, "node 2")
    generations.arrive(3, "node 3")
    generations.begin(planned=True)
    for member in range(4):
        generations.prepare(member, 1)
    generations.halt(said(0, 0, 7, answers=-1))
    assert not generations.is_stuck, "it stopped because it was asked to"
    generations.halt(said(0, 0, 7, answers=-1, failure="network"))
    assert generations.is_stuck


def test_who_is_left_out_is_no_source_and_stops_nobody() -> None:
    """It may have halted late, and have verified what it was to be given."""
    generations = trained(4)
    left_out: set[int] = set()
    generations._seat = lambda present, old: seats({m: n for m, n in present.items() if m not in left_out}, old)
    generations.lose([3])
    generations.arrive(9, "node 9")
    generations.begin()
    for member in (0, 1, 2):
        generations.halt(said(member, 0, 7, answers=2))
    left_out.add(9)
    assert set(generations.begin()[0].members) == {0, 1, 2, 9}, "it is told to halt like the others"
    generations.halt(said(9, -1, 0, answers=3, verified=2))
    generations.halt(said(0, 2, 7, answers=3))
    for member in (1, 2):
        orders = generations.halt(said(member, 0, 7, answers=3, verified=2))
    assert orders[-1].move is not None
    assert 9 not in orders[-1].members
    assert (orders[-1].move.source, orders[-1].move.present) == (2, [0, 1, 2])
    form(generations, 3)
    assert generations.halt(said(9, -1, 0, answers=3, failure="not prepared", failed=2)) == []
    assert generations.trains


@pytest.mark.parametrize("how", ["prepare", "move"])
def test_a_generation_that_cannot_be_formed_is_stuck_although_nobody_is_lost(how: str) -> None:
    generations = trained(4)
    generations.lose([3])
    if how == "prepare":
        assert generations.prepare(0, 1, "no route") == []
    else:
        for member in range(3):
            generations.halt(said(member, 0, 7, answers=1))
        assert not generations.is_stuck
        generations.halt(said(0, 0, 7, answers=1, failure="reset", failed=1))
    assert generations.is_stuck
    assert kinds(generations.begin()) == [HALT, PREPARE]
    assert not generations.is_stuck


def test_a_shortage_keeps_what_is_known_and_ends_when_members_come() -> None:
    generations = trained(2)
    assert kinds(generations.lose([1])) == [HALT]
    assert generations.shortage is not None
    (order,) = generations.halt(said(0, 0, 7))
    assert order.move is not None
    assert (order.kind, order.number, order.members) == (KEEP, 1, (0,))
    assert (order.move.source, order.move.step, order.move.present) == (0, 7, [0])
    assert generations.halt(said(0, 0, 7)) == [], "once"
    generations.arrive(2, "node 2")
    assert kinds(generations.begin()) == [HALT, PREPARE]
    (order,) = generations.halt(said(0, 0, 7))
    assert order.move is not None
    assert (order.kind, order.number, order.move.source, order.move.present) == (MOVE, 2, 0, [0])


def test_in_a_shortage_nothing_is_kept_that_is_not_complete() -> None:
    generations = Generations(partial(seats, least=3))
    for member in range(4):
        generations.arrive(member, f"node {member}")
    generations.begin()
    generations.restore(Restore())
    form(generations, 0)
    left = lose_both_owners(generations)
    assert generations.halt(said(left[0], 0, 7)) == []
    assert generations.halt(said(left[1], 0, 7)) == []
    assert generations.possible.keys() == {0}, "nothing is given up before somebody is there to go on"


def test_messages_of_other_generations_and_of_the_lost_say_nothing() -> None:
    generations = trained(4)
    generations.lose([3])
    assert generations.prepare(0, 0) == []
    assert not generations.form(0, 0)
    assert generations.halt(said(3, 0, 7)) == []
    assert generations.reports == {}


def test_a_coordinator_that_restarts_goes_on_only_if_all_ranks_have_adopted_the_newest() -> None:
    before = trained(4)
    present, possible = dict(before.present), dict(before.possible)
    generations = Generations(seats)
    assert generations.reattach(present, possible, 0, dict.fromkeys(range(4), 0)) == []
    assert generations.trains
    generations.halt(said(1, 0, 7, answers=-1))  # the word to regroup was the earlier one's
    assert generations.is_stuck

    generations = Generations(seats)
    orders = generations.reattach(present, possible, 4, {0: 0, 1: 0, 2: 0, 3: -1})
    assert [(order.kind, order.number) for order in orders] == [(HALT, 5), (PREPARE, 5)]
    generations.halt(said(0, 0, 6, answers=4))
    assert generations.reports == {}
