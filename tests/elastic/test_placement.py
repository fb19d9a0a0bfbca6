"""Are members spread evenly over what is free, never beyond it, and is a shortage told with its numbers?"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.placement import NodeCapacity, Shortage, place, shortage

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


@dataclass(frozen=True)
class Case:
    """A cluster, what it runs already, how many more members are wanted, what one takes, and where they went."""

    nodes: list[NodeCapacity]
    held: dict[str, int]
    wanted: int
    cpus: float
    gpus: float
    found: dict[str, int]

    def room(self, at: NodeCapacity) -> int:
        return at.workers(self.cpus, self.gpus)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, cpus, gpus = draw(clusters()), draw(shares), draw(gpu_shares)
    names = st.sampled_from([*(at.node_id for at in nodes), "one that has gone"])
    held, wanted = draw(st.dictionaries(names, st.integers(1, 5))), draw(st.integers(0, 30))
    return Case(nodes, held, wanted, cpus, gpus, place(nodes, wanted, cpus, gpus, held))


@given(cases())
def test_no_node_gets_more_than_it_has_free(case: Case) -> None:
    at = {node.node_id: node for node in case.nodes}
    for name, count in case.found.items():
        assert count > 0, "a node without members is not in it"
        assert count * case.cpus <= at[name].free_cpus + 1e-6
        assert count * case.gpus <= at[name].free_gpus + 1e-6


@given(cases())
def test_as_many_as_are_wanted_or_as_fit(case: Case) -> None:
    assert sum(case.found.values()) == min(case.wanted, sum(case.room(at) for at in case.nodes))


@given(cases())
def test_members_are_spread_evenly_over_what_nodes_run_already(case: Case) -> None:
    """No new member could move to a node that has room and would then still have fewer: losing a node costs the
    fewest."""

    def load(name: str) -> int:
        return case.held.get(name, 0) + case.found.get(name, 0)

    for at in case.nodes:
        if case.found.get(at.node_id, 0) < case.room(at):
            assert all(load(name) <= load(at.node_id) + 1 for name in case.found)


@given(cases())
def test_short_exactly_when_members_do_not_fit(case: Case) -> None:
    free, held = sum(case.room(at) for at in case.nodes), sum(case.held.values())
    found = shortage(case.nodes, case.wanted + held, held, case.cpus, case.gpus)
    assert (found.free < found.wanted) == (sum(case.found.values()) < case.wanted)
    assert (found.wanted, found.free, found.num_nodes) == (
        case.wanted + held,
        min(case.wanted, free) + held,
        len(case.nodes),
    )
    assert (found.cpus, found.gpus) == (case.cpus, case.gpus)
    assert found.possible >= free
    assert str(found.wanted) in str(found)


@given(case=cases(), data=st.data())
def test_the_order_in_which_nodes_are_named_does_not_matter(case: Case, data: st.DataObject) -> None:
    again = data.draw(st.permutations(case.nodes))
    assert place(again, case.wanted, case.cpus, case.gpus, case.held) == case.found


def test_ties_go_by_node_id() -> None:
    assert place([node("b", 2), node("a", 2)], 3, 1.0, 0.0) == {"a": 2, "b": 1}


def test_who_comes_later_goes_where_fewest_are() -> None:
    nodes = [node("a", 2), node("b", 4), node("c", 1)]
    assert place(nodes, 2, 1.0, 0.0, {"a": 1, "b": 2}) == {"c": 1, "a": 1}
    assert place(nodes, 4, 1.0, 0.0, {"a": 1, "b": 2}) == {"c": 1, "a": 2, "b": 1}


def test_a_full_node_is_passed_over() -> None:
    assert place([node("a", 0, total=4), node("b", 4)], 3, 1.0, 0.0) == {"b": 3}


def test_rounding_does_not_cost_a_member() -> None:
    assert node("a", 0.3).workers(0.1, 0.0) == 3
    assert node("a", 0.7 + 0.1 + 0.1 + 0.1).workers(1.0, 0.0) == 1
    assert node("a", 0.99).workers(1.0, 0.0) == 0


def test_gpus_bound_too() -> None:
    assert node("a", 8, gpus=2).workers(1.0, 1.0) == 2
    assert node("a", 1, gpus=2).workers(1.0, 1.0) == 1
    assert node("a", 8, gpus=2).workers(1.0, 0.0) == 8


def test_a_busy_cluster_is_waited_for() -> None:
    found = shortage([node("a", 1, total=4), node("b", 0.5, total=4)], 5, 0, 1.0, 0.0)
    assert found == Shortage(wanted=5, free=1, possible=8, num_nodes=2, cpus=1.0, gpus=0.0)
    assert str(found) == "waiting for 5 workers of 1 CPU each: 1 fit now on 2 nodes"


def test_a_cluster_that_is_too_small_is_said_to_be() -> None:
    found = shortage([node("a", 4, gpus=1, all_gpus=2)], 3, 0, 1.5, 1.0)
    assert found == Shortage(wanted=3, free=1, possible=2, num_nodes=1, cpus=1.5, gpus=1.0)
    assert str(found) == (
        "waiting for 3 workers of 1 GPU and 1.5 CPU each: 1 fit now on 1 node, "
        "2 at most on this node: add nodes or lower cluster.num_workers"
    )


def test_members_that_are_there_count_as_fitting() -> None:
    found = shortage([node("a", 0, total=2)], 3, held=2, cpus=1.0, gpus=0.0)
    assert str(found).startswith("waiting for 3 workers of 1 CPU each: 2 fit now on 1 node, 2 at most on this node")


def test_no_nodes_at_all() -> None:
    assert place([], 1, 1.0, 0.0) == {}
    assert shortage([], 1, 0, 1.0, 0.0) == Shortage(1, 0, 0, 0, 1.0, 0.0)
