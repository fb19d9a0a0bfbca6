"""Does a run take the largest world it can have, near to what the job asks, and do members stay where they are?"""

from __future__ import annotations

from itertools import pairwise, product
from math import lcm, log2
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.config import Job
from concertina.elastic.choice import CHOSEN, choose_layout, seat, take_seats
from concertina.elastic.second_owners import place_seconds
from concertina.errors import CapacityError, LayoutError
from concertina.layout import Layout, Seating, check_job
from concertina.layout.pieces import holdings
from tests.layout.small_models import MODELS, small_job

pytestmark = pytest.mark.unit


def a_job(workers: int = 8, batch: int = 64, model: dict[str, Any] | None = None, **layout: int) -> Job:
    document = {
        "name": "test",
        "model": model or {},
        "training": {"global_batch_size": batch},
        "layout": layout,
        "cluster": {"num_workers": workers, "num_nodes": 1},
    }
    return Job.model_validate(document)


def trainable(job: Job, world: int) -> list[Layout]:
    """By brute force and by the rules of a job file: every layout of so many ranks, without more stages and chunks than
    the job has."""
    found = []
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    for degrees in product(divisors, repeat=len(CHOSEN)):
        layout = job.layout.model_copy(update=dict(zip(CHOSEN, degrees, strict=True)))
        if layout.pp > job.layout.pp or layout.cp > job.layout.cp:
            continue
        cluster = job.cluster.model_copy(update={"num_workers": world})
        try:
            found.append(check_job(job.model_copy(update={"layout": layout, "cluster": cluster})))
        except LayoutError:
            continue
    return found


@settings(max_examples=30)
@given(st.data(), st.sampled_from(list(MODELS.values())), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_the_largest_world_and_the_nearest_degrees(
    data: st.DataObject, model: Any, workers: int, members: int, batch: int
) -> None:
    wanted = {axis: data.draw(st.sampled_from([1, 2, 4]), axis) for axis in ("tp", "ep", "etp")}
    wanted |= {axis: data.draw(st.sampled_from([1, 2]), axis) for axis in ("pp", "cp")}
    job = small_job(model, workers, **wanted)
    job = job.model_copy(update={"training": job.training.model_copy(update={"global_batch_size": batch})})
    layout, why = choose_layout(job, members)
    for world in range(layout.world + 1, min(workers, members) + 1):
        assert not trainable(job, world)
    there = trainable(job, layout.world)
    assert layout in there

    def distance(other: Layout) -> list[tuple[bool, float]]:
        pairs = ((getattr(other, axis), wanted[axis]) for axis in CHOSEN)
        return [(value > asked, abs(log2(value / asked))) for value, asked in pairs]

    assert distance(layout) == min(map(distance, there))
    assert why.startswith(f"world {layout.world} (dp {layout.dp}, ")
    assert "\n" not in why


@pytest.mark.parametrize(
    ("members", "job", "layout", "why"),
    [
        (4, a_job(4, ep=2), Layout(4, ep=2), "world 4 (dp 4, tp 1, etp 1, ep 2): all 4 members"),
        (3, a_job(4, ep=2), Layout(3), "world 3 (dp 3, tp 1, etp 1, ep 1): all 3 members; ep=2 does not fit"),
        (6, a_job(8, ep=4), Layout(6, ep=3), "world 6 (dp 6, tp 1, etp 1, ep 3): all 6 members; ep=4 does not fit"),
        (9, a_job(8, tp=2), Layout(8, tp=2), "world 8 (dp 4, tp 2, etp 1, ep 1): the job's 8 of 9 members"),
        (7, a_job(8, tp=2), Layout(7), "world 7 (dp 7, tp 1, etp 1, ep 1): all 7 members; tp=2 does not fit"),
        # Seven lanes cut no head, seven replicas lack sequences: six ranks, in lanes that the job did not ask for.
        (
            7,
            a_job(8, batch=3),
            Layout(6, tp=2),
            "world 6 (dp 3, tp 2, etp 1, ep 1): the largest that model and batch fit, of 7; tp=1 does not fit",
        ),
    ],
)
def test_why_in_one_line(members: int, job: Job, layout: Layout, why: str) -> None:
    assert choose_layout(job, members) == (layout, why)


def test_nobody_is_no_capacity() -> None:
    with pytest.raises(CapacityError, match="no member is left"):
        choose_layout(a_job(), 0)


def test_what_no_world_trains_is_said_as_for_a_job() -> None:
    model = {"capacity": {"factor": 1.25, "group_sequences": 4}}
    with pytest.raises(LayoutError, match="global_batch_size=6 is no multiple"):
        choose_layout(a_job(batch=6, model=model), 5)


@pytest.mark.parametrize(
    ("members", "layout"),
    [
        (8, Layout(8, pp=2, virtual=2, stage_layers=(1, 3, 3, 1))),
        (7, Layout(7)),
        (6, Layout(6, pp=2, virtual=2, stage_layers=(1, 3, 3, 1))),
        (1, Layout(1)),
    ],
)
def test_pieces_of_stages_stay_as_the_job_has_them_where_there_are_as_many(members: int, layout: Layout) -> None:
    job = a_job(8, pp=2, model={"num_hidden_layers": 8})
    cut = job.layout.model_copy(update={"virtual_stages": 2, "stage_layers": (1, 3, 3, 1)})
    assert choose_layout(job.model_copy(update={"layout": cut}), members)[0] == layout


# -- seats ----------------------------------------------------------------------------------------------------------

PAIRS = {member: f"n{member // 2}" for member in range(8)}


@st.composite
def seatings(draw: st.DrawFn) -> tuple[Layout, dict[int, str], Seating | None]:
    """A layout, members on nodes, and where some of them sat."""
    members = draw(st.permutations(range(12)))[: draw(st.integers(1, 12))]
    nodes = {member: draw(st.sampled_from("abcd")) for member in members}
    world = draw(st.integers(1, len(members)))
    tp = draw(st.sampled_from([d for d in (1, 2, 3, 4) if world % d == 0]))
    before = draw(st.permutations(range(12)))[: draw(st.integers(0, 12))]
    old = Seating(Layout(len(before)), tuple(before), (None,) * len(before)) if before else None
    return Layout(world, tp=tp), nodes, old


@given(seatings())
def test_everybody_has_one_place_and_state_goes_first(case: tuple[Layout, dict[int, str], Seating | None]) -> None:
    layout, nodes, old = case
    seating = take_seats(layout, nodes, old)
    assert sorted(seating.roster) == sorted(nodes)
    assert seating.layout == layout
    assert seating.seconds == place_seconds([nodes[member] for member in seating.members])
    has_state = {member for member in nodes if old is not None and old.rank_of(member) is not None}
    assert len(has_state & {*seating.members}) == min(len(has_state), layout.world)
    assert take_seats(layout, dict(reversed(nodes.items())), old) == seating


@given(seatings())
def test_ranks_of_a_node_are_neighbours(case: tuple[Layout, dict[int, str], Seating | None]) -> None:
    layout, nodes, old = case
    if old is not None and old.layout == layout:
        return  # survivors stay
    on = [nodes[member] for member in take_seats(layout, nodes, old).members]
    assert sum(a != b for a, b in pairwise(on)) == len(set(on)) - 1


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_lanes_stay_inside_nodes_of_whole_blocks(blocks: list[int], tp: int, etp: int) -> None:
    block = lcm(tp, etp)
    on = [f"n{node}" for node, count in enumerate(blocks) for _ in range(count * block)]
    nodes = dict(enumerate(on))
    old = take_seats(Layout(len(nodes), tp=tp, etp=etp), nodes, None)
    del nodes[0]  # one rank of the first node is lost, its whole block is of no use
    world = len(nodes) // block * block
    if world:
        layout = Layout(world, tp=tp, etp=etp)
        members = take_seats(layout, nodes, old).members
        for name in ("tp", "etp"):
            assert all(len({nodes[members[rank]] for rank in group}) == 1 for group in layout.groups(name))


def test_broken_blocks_do_not_shift_the_lanes_of_whole_ones() -> None:
    nodes = {member: "a" if member < 3 else "b" if member < 7 else "c" for member in range(12)}  # 3, 4 and 5 ranks
    layout = Layout(12, tp=4)
    members = take_seats(layout, nodes, None).members
    assert sum(len({nodes[members[rank]] for rank in group}) == 1 for group in layout.groups("tp")) == 2


def test_survivors_keep_their_order_and_newcomers_come_last() -> None:
    old = take_seats(Layout(8), PAIRS, None)
    left = {member: node for member, node in PAIRS.items() if node != "n1"}
    assert take_seats(Layout(6), left, old).members == (0, 1, 4, 5, 6, 7)
    grown = take_seats(Layout(7), {**left, 20: "new", 21: "new"}, old)
    assert grown.members == (0, 1, 4, 5, 6, 7, 20)
    assert grown.spares == (21,)


def test_newcomers_take_the_seats_of_the_lost_where_the_layout_stays() -> None:
    old = take_seats(Layout(8), PAIRS, None)
    left = {member: node for member, node in PAIRS.items() if node != "n1"}
    replaced = take_seats(Layout(8), {**left, 20: "new", 21: "new"}, old)
    assert replaced.members == (0, 1, 20, 21, 4, 5, 6, 7)
    assert replaced.seconds == old.seconds
    # A process that comes back on its own node sits where its forerunner sat, whoever else waits.
    left = {member: node for member, node in PAIRS.items() if member not in (3, 4)}
    again = take_seats(Layout(8), {**left, 30: "n2", 31: "n1"}, old)
    assert again.members == (0, 1, 2, 31, 30, 5, 6, 7)
    assert again.seconds == old.seconds


def test_seats_are_given_up_where_keeping_them_would_tear_lanes_apart() -> None:
    old = take_seats(Layout(4, tp=2), {0: "a", 1: "a", 2: "b", 3: "b"}, None)
    new = take_seats(Layout(4, tp=2), {0: "a", 2: "b", 8: "c", 9: "c"}, old)
    assert new.members == (8, 9, 0, 2)


def test_a_spare_takes_over_and_the_smaller_world_leaves_one() -> None:
    job = small_job(MODELS["even"], 4, tp=2)
    nodes = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c"}
    old = seat(job, nodes, None)
    assert (old.members, old.spares) == ((0, 1, 2, 3), (4,))
    left = {member: node for member, node in nodes.items() if member != 1}
    new = seat(job, left, old)
    assert new.layout == old.layout
    assert new.spares == ()
    assert {new.rank_of(2), new.rank_of(3)} == {2, 3}
    del left[4]
    assert seat(job, left, old).layout == Layout(3)


def test_a_new_seating_holds_all_of_a_model_twice() -> None:
    job = small_job(MODELS["odd"], 6, ep=2)
    seating = seat(job, {member: "abc"[member % 3] for member in range(6)}, None)
    held = [holdings(job.model, seating, member) for member in seating.members]
    one = holdings(job.model, take_seats(Layout(1), {0: "a"}, None), 0)
    for name, boxes in one.items():
        assert sum(box.size for each in held for box in each.get(name, [])) == 2 * boxes[0].size
