"""Are ranks spread evenly over what is free, never beyond it, and is a shortage told with its numbers?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.placement import NodeCapacity, Placement, Shortage, place

pytestmark = pytest.mark.unit


def node(
    name: str, free: float, total: float | None = None, gpus: float = 0, all_gpus: float | None = None
) -> NodeCapacity:
    return NodeCapacity(
        name,
        f"10.0.0.{len(name)}",
        free,
        gpus,
        free if total is None else total,
        gpus if all_gpus is None else all_gpus,
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeCapacity]:
    found = []
    for index in draw(st.permutations(range(draw(st.integers(0, 6))))):
        total_cpus, total_gpus = draw(st.integers(0, 12)), draw(st.integers(0, 8))
        free = draw(st.integers(0, total_cpus * 10)) / 10
        found.append(
            NodeCapacity(f"n{index}", "10.0.0.1", free, draw(st.integers(0, total_gpus)), total_cpus, total_gpus)
        )
    return found


shares = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
gpu_shares = st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[NodeCapacity], int, float, float, Placement]:
    """A cluster, a world that fits into it, what a rank takes, and where the ranks went."""
    nodes, cpus, gpus = [*draw(clusters()), node("one that has room", 2, gpus=1)], draw(shares), draw(gpu_shares)
    world = draw(st.integers(1, sum(at.workers(cpus, gpus) for at in nodes)))
    found = place(nodes, world, cpus, gpus)
    assert isinstance(found, Placement)
    return nodes, world, cpus, gpus, found


@given(placed())
def test_no_node_gets_more_than_it_has_free(case: tuple[list[NodeCapacity], int, float, float, Placement]) -> None:
    _, world, cpus, gpus, found = case
    assert sum(found.counts) == world
    for at, count in zip(found.nodes, found.counts, strict=True):
        assert count > 0, "a node without ranks is not in it"
        assert count * cpus <= at.free_cpus + 1e-6
        assert count * gpus <= at.free_gpus + 1e-6


@given(placed())
def test_ranks_are_spread_evenly(case: tuple[list[NodeCapacity], int, float, float, Placement]) -> None:
    """No rank could move to a node that has room and two ranks fewer: losing a node costs the fewest."""
    nodes, _, cpus, gpus, found = case
    taken = {at.node_id: count for at, count in zip(found.nodes, found.counts, strict=True)}
    for at in nodes:
        if taken.get(at.node_id, 0) < at.workers(cpus, gpus):
            assert max(taken.values()) - taken.get(at.node_id, 0) <= 1


@given(nodes=clusters(), world=st.integers(1, 30), cpus=shares, gpus=gpu_shares)
def test_short_exactly_when_ranks_do_not_fit(nodes: list[NodeCapacity], world: int, cpus: float, gpus: float) -> None:
    found, free = place(nodes, world, cpus, gpus), sum(at.workers(cpus, gpus) for at in nodes)
    assert isinstance(found, Shortage) == (free < world)
    if isinstance(found, Shortage):
        assert (found.wanted, found.free, found.num_nodes) == (world, free, len(nodes))
        assert (found.cpus, found.gpus) == (cpus, gpus)
        assert found.possible >= found.free
        assert str(world) in str(found)


@given(nodes=clusters(), world=st.integers(1, 30), data=st.data())
def test_the_order_in_which_nodes_are_named_does_not_matter(
    nodes: list[NodeCapacity], world: int, data: st.DataObject
) -> None:
    assert place(data.draw(st.permutations(nodes)), world, 1.0, 0.0) == place(nodes, world, 1.0, 0.0)


def test_consecutive_ranks_share_a_node() -> None:
    found = place([node("b", 4), node("a", 1), node("c", 3)], 6, 1.0, 0.0)
    assert isinstance(found, Placement)
    assert [(at.node_id, ranks) for at, ranks in found.ranks()] == [("a", [0]), ("b", [1, 2, 3]), ("c", [4, 5])]


def test_ties_go_by_node_id() -> None:
    found = place([node("b", 2), node("a", 2)], 3, 1.0, 0.0)
    assert isinstance(found, Placement)
    assert [(at.node_id, count) for at, count in zip(found.nodes, found.counts, strict=True)] == [("a", 2), ("b", 1)]


def test_rounding_does_not_cost_a_rank() -> None:
    assert node("a", 0.3).workers(0.1, 0.0) == 3
    assert node("a", 0.7 + 0.1 + 0.1 + 0.1).workers(1.0, 0.0) == 1
    assert node("a", 0.99).workers(1.0, 0.0) == 0


def test_gpus_bound_too() -> None:
    assert node("a", 8, gpus=2).workers(1.0, 1.0) == 2
    assert node("a", 1, gpus=2).workers(1.0, 1.0) == 1
    assert node("a", 8, gpus=2).workers(1.0, 0.0) == 8


def test_a_busy_cluster_is_waited_for() -> None:
    found = place([node("a", 1, total=4), node("b", 0.5, total=4)], 5, 1.0, 0.0)
    assert found == Shortage(wanted=5, free=1, possible=8, num_nodes=2, cpus=1.0, gpus=0.0)
    assert str(found) == "waiting for 5 workers of 1 CPU each: 1 fit now on 2 nodes"


def test_a_cluster_that_is_too_small_is_said_to_be() -> None:
    found = place([node("a", 4, gpus=1, all_gpus=2)], 3, 1.5, 1.0)
    assert found == Shortage(wanted=3, free=1, possible=2, num_nodes=1, cpus=1.5, gpus=1.0)
    assert str(found) == (
        "waiting for 3 workers of 1 GPU and 1.5 CPU each: 1 fit now on 1 node, "
        "2 at most on this node: add nodes or lower cluster.num_workers"
    )


def test_no_nodes_at_all() -> None:
    assert place([], 1, 1.0, 0.0) == Shortage(1, 0, 0, 0, 1.0, 0.0)
