"""Is who is slow found soon, who is not left alone, and is what is done about it worth it? (`Paces`, `remedies`)"""

from __future__ import annotations

from random import Random

import pytest

from concertina.elastic.stragglers import Kind, Pace, Paces, Straggler, Work, loads_of, remedies
from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit


WORK = Work(840)  # of so many, what is left over is nothing


def seated(layout: Layout, loads: tuple[int, ...] = (), spares: tuple[int, ...] = ()) -> Seating:
    members = tuple(10 + rank for rank in range(layout.world))
    return Seating(layout, members, (None,) * layout.world, spares, loads)


def found_after(
    seating: Seating, slowness: dict[int, float], steps: int, *, step_s: float = 0.25, noise: float = 0.0, seed: int = 7
) -> tuple[int | None, list[Straggler]]:
    """Steps until somebody is found, and who; beats come after every step. A stage's work is its number and one."""
    paces, chance = Paces(seating, WORK), Random(seed)
    busy = dict.fromkeys(seating.members, 0.0)
    at_s = 0.0
    for step in range(1, steps + 1):
        spent = {}
        for rank, member in enumerate(seating.members):
            position = seating.layout.coordinate(rank, "dp")  # type: ignore[arg-type]
            load = seating.loads[position] * len(seating.loads) / sum(seating.loads) if seating.loads else 1.0
            stage = 1 + seating.layout.coordinate(rank, "pp")  # type: ignore[arg-type]
            spent[member] = step_s * stage * load * slowness.get(member, 1.0) * chance.uniform(1, 1 + noise)
        at_s += max(spent.values())
        for member, seconds in spent.items():
            busy[member] += seconds
            paces.hear(member, Pace(step, busy[member], at_s))
        if stragglers := paces.stragglers():
            return step, stragglers
    return None, []


@pytest.mark.parametrize("factor", [1.3, 3.0])
@pytest.mark.parametrize("layout", [Layout(2), Layout(4), Layout(8, tp=2), Layout(8, pp=2)], ids=str)
def test_who_is_slow_is_found_within_twenty_steps(layout: Layout, factor: float) -> None:
    seating = seated(layout)
    slow = seating.members[-1]
    step, stragglers = found_after(seating, {slow: factor}, 20, noise=0.02)
    assert step is not None
    assert step <= 20
    assert [straggler.member for straggler in stragglers] == [slow]
    assert stragglers[0].factor == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("factor", [1.3, 3.0])
def test_and_so_it_is_whenever_it_begins(factor: float) -> None:
    seating = seated(Layout(4))
    for begins in range(20, 40):
        paces, at_s = Paces(seating, WORK), 0.0
        busy = dict.fromkeys(seating.members, 0.0)
        for step in range(1, begins + 20):
            spent = {m: 0.25 * (factor if m == 12 and step >= begins else 1.0) for m in seating.members}
            at_s += max(spent.values())
            for member, seconds in spent.items():
                busy[member] += seconds
                paces.hear(member, Pace(step, busy[member], at_s))
            if paces.stragglers():
                break
        assert [straggler.member for straggler in paces.stragglers()] == [12], begins


@pytest.mark.parametrize("ramp_steps", [60, 240, 1000])
def test_one_that_grows_hot_is_found_within_twenty_steps_of_where_it_counts(ramp_steps: int) -> None:
    """By a little more with every step, up to 1.6 times; a fifth more is what counts, and it is found by 1.3."""
    paces, chance, at_s = Paces(seated(Layout(4)), WORK), Random(7), 0.0
    busy = dict.fromkeys(range(10, 14), 0.0)
    for step in range(1, ramp_steps + 40):
        factor = 1 + 0.6 * min(1.0, step / ramp_steps)
        spent = {m: 0.25 * chance.uniform(1, 1.02) * (factor if m == 12 else 1.0) for m in busy}
        at_s += max(spent.values())
        for member, seconds in spent.items():
            busy[member] += seconds
            paces.hear(member, Pace(step, busy[member], at_s))
        if paces.stragglers():
            break
    assert [straggler.member for straggler in paces.stragglers()] == [12]
    assert factor > 1.15, "not before it matters"
    assert step <= ramp_steps / 2 + 20


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_nobody_is_found_where_all_are_alike(noise: float) -> None:
    """Ten thousand steps of eight members, each up to twice as long as another."""
    for seed in range(5):
        assert found_after(seated(Layout(8)), {}, 2000, noise=noise, seed=seed) == (None, [])


def test_one_hiccup_is_none() -> None:
    paces = Paces(seated(Layout(4)), WORK)
    for step in range(1, 60):
        for member in range(10, 14):
            hiccup = 5.0 if member == 12 and step >= 20 else 0.0
            paces.hear(member, Pace(step, step * 0.25 + hiccup, step * 0.25))
            assert paces.stragglers() == []


def test_stages_are_compared_with_themselves_and_loads_are_taken_into_account() -> None:
    assert found_after(seated(Layout(4, pp=4)), {}, 200) == (None, []), "each alone in its stage"
    assert found_after(seated(Layout(3), loads=(1000, 333, 1000)), {}, 200) == (None, [])
    assert found_after(seated(Layout(3), loads=(1000, 333, 1000)), {11: 3.0}, 200)[1][0].member == 11


def test_a_member_that_begins_anew_is_heard_anew() -> None:
    paces = Paces(seated(Layout(2)), WORK)
    paces.hear(10, Pace(500, 100.0, 0.0))
    for step in range(1, 40):
        for member in (10, 11):
            paces.hear(member, Pace(step, step * 0.25, step * 0.25))
    assert paces.are_known
    assert paces.stragglers() == []


def test_loads_are_in_inverse_proportion_to_the_slowest_of_a_position() -> None:
    assert loads_of(Layout(4), (10, 11, 12, 13), {}) == ()
    assert loads_of(Layout(4), (10, 11, 12, 13), {12: 3.0}) == (1000, 1000, 333, 1000)
    assert loads_of(Layout(4, tp=2), (10, 11, 12, 13), {11: 2.0, 10: 1.5}) == (500, 1000)


@pytest.mark.parametrize(
    ("factor", "sequences", "spares", "best", "step_s"),
    [
        (1.3, 64, (), Kind.REBALANCE, 1.0 * 17 / (1.3 * 16)),  # 17 + 17 + 17 + 13
        (3.0, 64, (), Kind.REBALANCE, 20 / 48),  # 19 + 19 + 19 + 7: the slow one takes 21
        (3.0, 64, (20,), Kind.REPLACE, 1 / 3),
        (1.3, 4, (), None, 0.0),  # one sequence each: nothing can be dealt out otherwise
        (3.0, 4, (), Kind.EVICT, 4 / 9),
    ],
)
def test_the_best_remedy(
    factor: float, sequences: int, spares: tuple[int, ...], best: Kind | None, step_s: float
) -> None:
    seating = seated(Layout(4), spares=spares)
    found = remedies(Straggler(12, factor, 1.0), seating, {12: factor}, Work(sequences), 3, has_spare=bool(spares))
    if best is None:
        assert found == []
        return
    assert found[0].kind is best
    assert found[0].step_s == pytest.approx(step_s, rel=0.08)


def test_nothing_is_done_that_is_not_worth_it() -> None:
    """Who already has so much less to do that the world does not wait for it any more."""
    seating = seated(Layout(4), loads=(1000, 1000, 333, 1000))
    assert remedies(Straggler(12, 3.0, 1.0), seating, {12: 3.0}, Work(64), 3) == []


@pytest.mark.parametrize(
    ("work", "dp", "loads", "done"),
    [
        (Work(16), 5, (), [4, 3, 3, 3, 3]),
        (Work(6), 4, (), [2, 2, 1, 1]),
        (Work(4), 6, (), [1, 1, 1, 1, 1, 1]),  # who has none computes one that counts for nothing
        (Work(64), 4, (1000, 1000, 333, 1000), [19, 19, 7, 19]),
        (Work(64, most=1), 4, (1000, 1000, 333, 1000), [19, 19, 19, 19]),  # as many micro-batches everywhere
        (Work(64, most=4), 4, (1000, 1000, 333, 1000), [19, 19, 7, 19]),
    ],
)
def test_what_each_position_computes(work: Work, dp: int, loads: tuple[int, ...], done: list[int]) -> None:
    assert work.done(dp, loads) == done


@pytest.mark.parametrize(("units", "world"), [(16, 5), (16, 7), (8, 7), (6, 4), (4, 3)])
def test_who_has_one_sequence_more_is_not_slow(units: int, world: int) -> None:
    """Worlds that a loss leaves, in which batches are not dealt out evenly."""
    work, seating = Work(units), seated(Layout(world))
    paces, done = Paces(seating, work), Work(units).done(world)
    for step in range(1, 100):
        for member, number in zip(seating.members, done, strict=True):
            paces.hear(member, Pace(step, step * 0.1 * number, step * 0.1 * max(done)))
        assert paces.stragglers() == []


def test_fewer_sequences_are_no_remedy_where_all_do_as_many_micro_batches() -> None:
    seating = seated(Layout(4))
    kinds = {remedy.kind for remedy in remedies(Straggler(12, 3.0, 1.0), seating, {12: 3.0}, Work(64, most=1), 3)}
    assert kinds == {Kind.EVICT}


def test_what_was_done_beside_steps_is_in_no_window() -> None:
    """A validation, of all members at a time."""
    paces = Paces(seated(Layout(2)), WORK)
    pause_s = 0.0
    for step in range(1, 60):
        if step == 30:
            pause_s = 20.0
            for member in (10, 11):
                paces.pause(member)
        for member in (10, 11):
            paces.hear(member, Pace(step, step * 0.25, step * 0.25 + pause_s))
    assert paces.step_s == pytest.approx(0.25)
