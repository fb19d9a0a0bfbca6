"""Does a rank get the groups its layout says, can it drop them and form the next ones, and who can listen in?"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from concertina.layout import ENDS, GROUPS, STAGE, Layout
from concertina.parallel.collectives import all_gather_into, all_reduce_sum
from concertina.parallel.failures import is_communication_failure
from concertina.parallel.groups import GROUP_NAMES, KV, SECONDS, Group, GroupOptions, Groups, connect_store, form_groups
from tests.distributed import listening_store, run_distributed

WORLD = 4
LAYOUTS = [
    Layout(4, ep=2),
    Layout(4, tp=2, ep=4),
    Layout(4, pp=2, cp=2, etp=2),
    Layout(4, pp=4),
    Layout(4, tp=2, cp=2, ep=2, etp=2),
]


def listening_addresses() -> list[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return [tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN]


def members(group: Group, rank: int) -> list[int]:
    """Who answers on this group's wire, in its order."""
    found = torch.full((group.size,), -1, dtype=torch.int64)
    return all_gather_into(found, torch.tensor([rank]), group).finish().tolist()


# -- what needs no peers -----------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_every_group_of_a_layout_is_formed() -> None:
    assert set(GROUP_NAMES) == {*GROUPS, STAGE, KV, ENDS, SECONDS}


@pytest.mark.unit
def test_alone_every_group_holds_rank_0_only() -> None:
    groups = Groups.alone()
    assert [groups[name].ranks for name in GROUP_NAMES] == [(0,)] * len(GROUP_NAMES)
    assert (groups.world.size, groups.world.rank, groups.world.backend) == (1, 0, None)
    assert Group.alone("ep", 3).ranks == (3,)


@pytest.mark.unit
def test_groups_compare_by_ranks_not_by_connection() -> None:
    assert Group("ep", (0, 1), 0, object()) == Group("ep", (0, 1), 0)
    assert Group("ep", (0, 1), 0) != Group("ep", (0, 1), 1)


@pytest.mark.unit
def test_a_store_listens_on_the_given_address_only() -> None:
    store = listening_store()
    assert [host for host, port in listening_addresses() if port == store.port] == ["127.0.0.1"]


@pytest.mark.unit
def test_a_store_that_is_not_there_is_an_error_of_the_network() -> None:
    store = listening_store()
    port = store.port
    del store
    with pytest.raises(dist.DistError):
        connect_store("127.0.0.1", port, timedelta(seconds=0.2))


# -- ranks -------------------------------------------------------------------------------------------------------------


def one_generation_after_another(rank: int, store: Any) -> list[dict[str, list[int]]]:
    """Form every layout's groups in turn, over one store, in the same processes; the ones before are dropped."""
    seen = []
    for generation, layout in enumerate(LAYOUTS):
        groups = form_groups(layout, rank, store, GroupOptions(generation, timeout=timedelta(seconds=20)), layout.tp)
        assert groups.layout == layout
        assert groups.rank == rank
        assert groups.generation == generation
        assert groups.world.ranks == tuple(range(WORLD))
        found = {name: members(groups[name], rank) for name in GROUP_NAMES}
        for name in GROUP_NAMES:
            group = groups[name]
            assert group.name == name
            assert group.ranks[group.rank] == rank
            assert (group.backend is None) == (group.size == 1)
        found["world"] = members(groups.world, rank)
        seen.append(found)
        del groups, group
    assert not dist.is_initialized(), "torch's global group would outlive a generation"
    return seen


@pytest.mark.dist
def test_generations_follow_each_other_in_the_same_processes() -> None:
    for rank, seen in enumerate(run_distributed(one_generation_after_another, WORLD)):
        for layout, found in zip(LAYOUTS, seen, strict=True):
            assert found.pop("world") == found.pop(SECONDS) == list(range(WORLD))
            assert found.pop(ENDS) == list(layout.ends_of(rank))
            assert found.pop(KV) == list(layout.neighbours_of(rank, layout.tp)) == found[STAGE]
            assert found == {name: list(layout.group_of(name, rank)) for name in (*GROUPS, STAGE)}


def without_the_store(rank: int, store: Any) -> dict[str, Any]:
    """Groups over a store that rank 0 serves and then closes; what this process listens on, and a sum afterwards."""
    second = None
    if rank == 0:
        second = listening_store()
        store.set("port", str(second.port))
    joined = connect_store("127.0.0.1", int(store.get("port")), timedelta(seconds=20))
    groups = form_groups(Layout(2), rank, joined, GroupOptions(timeout=timedelta(seconds=20)))
    addresses = {host for host, _ in listening_addresses()}
    all_reduce_sum(torch.zeros(1), groups.world).finish()
    del joined
    del second
    store.set(f"closed{rank}", "")
    store.wait(["closed0", "closed1"])
    sums = {}
    for name, group in [("world", groups.world), ("dp", groups["dp"]), ("edp", groups["edp"])]:
        sums[name] = all_reduce_sum(torch.tensor([float(rank + 1)]), group).finish().item()
    return {"addresses": addresses, "sums": sums}


@pytest.mark.dist
def test_after_forming_nothing_needs_the_store_and_nothing_listens_beyond_loopback() -> None:
    for found in run_distributed(without_the_store, 2):
        assert found["sums"] == {"world": 3.0, "dp": 3.0, "edp": 3.0}
        assert found["addresses"] <= {"127.0.0.1"}


def with_an_older_rank(rank: int, store: Any) -> bool:
    """Rank 0 stands in generation 0, rank 1 in generation 1."""
    try:
        form_groups(Layout(2), rank, store, GroupOptions(rank, timeout=timedelta(seconds=0.5)))
    except RuntimeError as error:
        return is_communication_failure(error)
    return False


@pytest.mark.dist
def test_an_older_rank_cannot_join_a_newer_group() -> None:
    assert run_distributed(with_an_older_rank, 2) == [True, True]
