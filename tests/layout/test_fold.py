"""Does a layout put every rank where Megatron-Core's order `tp-cp-ep-dp-pp` puts it, on both grids?"""

from __future__ import annotations

import json
import pickle
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.errors import LayoutError
from concertina.layout import ATTENTION, EXPERT, GROUPS, Axis, Layout
from tests.layout.layouts import layouts

pytestmark = pytest.mark.unit


MEGATRON = {"attention": "tp-cp-dp-pp", "expert": "etp-ep-edp-pp"}
LISTING_1 = {"attention": "tp-cp-pp-dp", "expert": "etp-ep-pp-edp"}  # arXiv 2504.14960: dp slowest


def brute_force(layout: Layout, name: str, written: str) -> set[tuple[int, ...]]:
    """An oracle of its own: number every cell of the grid in the given order (fastest axis first), then gather the
    ranks whose coordinates differ on the group's axes only."""
    order = written.split("-")
    sizes = [getattr(layout, axis) for axis in order]
    cells = product(*(range(size) for size in reversed(sizes)))  # the last of `product` varies fastest
    gathered: dict[tuple[int, ...], list[int]] = {}
    for rank, cell in enumerate(cells):
        place = dict(zip(reversed(order), cell, strict=True))
        key = tuple(place[axis] for axis in order if axis not in GROUPS[name])
        gathered.setdefault(key, []).append(rank)
    return {tuple(ranks) for ranks in gathered.values()}


def as_set(groups: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(group) for group in groups}


@given(layouts(), st.sampled_from(list(GROUPS)))
def test_groups_equal_the_oracle(layout: Layout, name: str) -> None:
    side = "attention" if set(GROUPS[name]) <= set(ATTENTION) else "expert"
    assert as_set(layout.groups(name)) == brute_force(layout, name, MEGATRON[side])


@given(layouts(), st.sampled_from(list(GROUPS)))
def test_every_group_name_partitions_the_ranks(layout: Layout, name: str) -> None:
    groups = layout.groups(name)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    size = prod(layout.degree(axis) for axis in GROUPS[name])
    assert all(len(group) == size and group == sorted(group) for group in groups)
    assert groups == sorted(groups)


@given(layouts())
def test_both_grids_fill_a_stage(layout: Layout) -> None:
    assert layout.dp * layout.cp * layout.tp == layout.edp * layout.ep * layout.etp == layout.stage
    assert layout.stage * layout.pp == layout.world
    assert layout.attention.size == layout.expert.size == layout.world


@given(layouts())
def test_pipeline_groups_are_the_same_on_both_sides(layout: Layout) -> None:
    attention, expert = layout.attention.groups((Axis.PP,)), layout.expert.groups((Axis.PP,))
    assert attention == expert == layout.groups("pp")
    assert all(group[0] < layout.stage for group in attention)


def test_the_paper_s_listing_1_breaks_the_pipeline() -> None:
    layout = Layout(16, pp=2, cp=2, tp=2, ep=8)
    attention, expert = (brute_force(layout, "pp", order) for order in LISTING_1.values())
    assert (0, 4) in attention
    assert (0, 8) in expert
    assert attention != expert
    assert {brute == as_set(layout.groups("pp")) for brute in (attention, expert)} == {False, True}


@given(layouts())
def test_listing_1_holds_only_where_it_is_not_needed(layout: Layout) -> None:
    """Its two pipelines agree exactly when there is one stage, or tp*cp == etp*ep (then its dp is edp too)."""
    attention, expert = (brute_force(layout, "pp", order) for order in LISTING_1.values())
    harmless = layout.pp == 1 or layout.tp * layout.cp == layout.etp * layout.ep
    assert (attention == expert) == harmless
    assert brute_force(layout, "pp", MEGATRON["attention"]) == brute_force(layout, "pp", MEGATRON["expert"])


@given(layouts(), st.data())
def test_one_rank_at_a_time_says_the_same(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    for name in GROUPS:
        mine = layout.group_of(name, rank)
        assert rank in mine
        assert list(mine) in layout.groups(name)


@given(layouts(), st.data())
def test_coordinates_give_the_rank_back(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    for axes, grid in ((ATTENTION, layout.attention), (EXPERT, layout.expert)):
        assert sum(layout.coordinate(rank, axis) * grid.stride(axis) for axis in axes) == rank
        assert all(0 <= layout.coordinate(rank, axis) < layout.degree(axis) for axis in axes)


def test_the_document_of_64_ranks() -> None:
    layout = Layout(64, pp=2, cp=2, tp=4, ep=8, etp=1)
    document = json.loads(json.dumps(layout.to_json()))
    assert list(document) == ["world", "attention", "expert", "groups"]
    assert document["world"] == 64
    assert document["attention"] == {"pp": 2, "dp": 4, "cp": 2, "tp": 4}
    assert document["expert"] == {"pp": 2, "edp": 4, "ep": 8, "etp": 1}
    assert list(document["groups"]) == ["tp", "cp", "dp", "dp_cp", "tp_cp", "pp", "ep", "etp", "edp", "etp_ep"]
    assert document["groups"]["tp"][:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert document["groups"]["cp"][:2] == [[0, 4], [1, 5]]
    assert document["groups"]["dp"][0] == [0, 8, 16, 24]
    assert document["groups"]["pp"][0] == [0, 32]
    assert document["groups"]["ep"][0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert document["groups"]["edp"][0] == [0, 8, 16, 24]


def test_pieces_of_the_model_are_dealt_out_in_turn() -> None:
    layout = Layout(4, pp=2, virtual=2)
    assert [list(layout.piece_layers(5, piece)) for piece in range(4)] == [[0, 1], [2], [3], [4]]
    assert [list(layout.pieces_of(rank)) for rank in range(4)] == [[0, 2], [0, 2], [1, 3], [1, 3]]
    assert layout.layers_of(5, 3) == [2, 4]
    uneven = Layout(2, pp=2, stage_layers=(1, 4))
    assert [uneven.layers_of(5, rank) for rank in range(2)] == [[0], [1, 2, 3, 4]]
    said = [{key: each.facts[key] for key in each.facts.keys() - each.degrees.keys()} for each in (layout, uneven)]
    assert said == [{"virtual": 2}, {"stage_layers": [1, 4]}]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"virtual": 2}, "virtual=2 needs stages"),
        ({"pp": 2, "stage_layers": (3,)}, "stage_layers must be 2 positive numbers"),
        ({"pp": 2, "stage_layers": (3, 0)}, "stage_layers must be 2 positive numbers"),
    ],
)
def test_pieces_that_are_none_are_refused(given: Any, told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        Layout(2, **given)


def test_both_ends_of_the_model() -> None:
    layout = Layout(12, pp=3, tp=2)
    assert [layout.ends_of(rank) for rank in (0, 3, 5, 9)] == [(0, 2, 8, 10), (1, 3, 9, 11), (5,), (1, 3, 9, 11)]
    assert Layout(4, tp=2).ends_of(3) == (3,)


def test_a_layout_is_a_value() -> None:
    layout = Layout(8, ep=4)
    layout.groups("ep")
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout == Layout(8, 1, 1, 1, 4, 1)
    assert hash(again) == hash(layout)
    with pytest.raises(AttributeError):
        layout.ep = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("degrees", "line"),
    [
        ({"world": 8, "ep": 6}, "ep=6 must divide dp*cp*tp=8: set layout.ep to 1, 2, 4 or 8"),
        ({"world": 12, "pp": 5}, "pp=5 must divide world=12: set layout.pp to 1, 2, 3, 4, 6 or 12"),
        ({"world": 8, "pp": 2, "tp": 3}, "tp=3 must divide world/pp=4: set layout.tp to 1, 2 or 4"),
        ({"world": 8, "tp": 2, "cp": 3}, "cp=3 must divide world/tp=4: set layout.cp to 1, 2 or 4"),
        ({"world": 8, "etp": 2, "ep": 8}, "ep=8 must divide dp*cp*tp/etp=4: set layout.ep to 1, 2 or 4"),
        ({"world": 0}, "world=0 must be at least 1"),
        ({"world": 4, "ep": 0}, "ep=0 must be at least 1"),
    ],
)
def test_refusals_have_numbers_and_values_that_work(degrees: dict[str, int], line: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(**degrees)
    assert caught.value.data["problems"] == [line]
    assert caught.value.exit_code == 2


def test_both_sides_are_reported_at_once() -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(64, pp=2, tp=3, etp=5)
    assert caught.value.data["keys"] == ["tp", "etp"]
    assert len(caught.value.message.splitlines()) == 2


@given(
    st.integers(1, 96),
    st.fixed_dictionaries({axis: st.integers(1, 12) for axis in ("pp", "cp", "tp", "ep", "etp")}),
)
def test_whatever_is_not_refused_fits(world: int, degrees: dict[str, int]) -> None:
    fits = not (
        world % degrees["pp"]
        or world // degrees["pp"] % (degrees["cp"] * degrees["tp"])
        or world // degrees["pp"] % (degrees["ep"] * degrees["etp"])
    )
    try:
        layout = Layout(world, **degrees)
    except LayoutError:
        assert not fits
    else:
        assert fits
        assert layout.dp * layout.cp * layout.tp * layout.pp == world
