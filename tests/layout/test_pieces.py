"""Does every element have one owner, the one that the buckets give it to?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.config import ModelConfig
from concertina.layout import ENDS, Box, Layout, Seating, kv_copies, plan_buckets, rank_slots, shards
from concertina.layout.pieces import holdings, ownership, pieces
from tests.layout.layouts import layouts
from tests.layout.small_models import MODELS, ODD, layouts_of

pytestmark = pytest.mark.unit

models = st.sampled_from(list(MODELS.values()))


def bucketed(model: ModelConfig, layout: Layout, rank: int) -> dict[str, Box]:
    """As an engine finds them: buckets first, then each bucket's slots."""
    found = {}
    for bucket in plan_buckets(shards(model, layout, rank).values()):
        group = bucket[0].group
        if group == "dp_cp_kv":
            ranks = layout.neighbours_of(rank, kv_copies(model, layout.tp))
        elif group == ENDS:
            ranks = layout.ends_of(rank)
        else:
            ranks = layout.group_of(group, rank)
        slots = rank_slots({shard.name: shard.box for shard in bucket}, len(ranks), ranks.index(rank))
        found.update({name: slot.box for name, slot in slots.items() if slot.numel})
    return found


def count_owners(model: ModelConfig, layout: Layout, ranks: range) -> dict[str, np.ndarray]:
    shapes = {name: shard.global_shape for name, shard in shards(model, Layout(1), 0).items()}
    owners = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for rank in ranks:
        for name, box in pieces(model, layout, rank).items():
            assert box.size
            owners[name][box.slices()] += 1
    return owners


@settings(max_examples=40)
@given(st.data(), models)
def test_pieces_are_those_of_the_buckets(data: st.DataObject, model: ModelConfig) -> None:
    layout = data.draw(layouts_of(model, 12))
    for rank in range(layout.world):
        assert pieces(model, layout, rank) == bucketed(model, layout, rank)


@settings(max_examples=40)
@given(st.data(), models)
def test_every_element_has_one_owner(data: st.DataObject, model: ModelConfig) -> None:
    layout = data.draw(layouts_of(model, 12))
    assert all((owners == 1).all() for owners in count_owners(model, layout, range(layout.world)).values())
    if layout.world > 1:  # the oracle sees a rank that is missing
        assert any((owners != 1).any() for owners in count_owners(model, layout, range(1, layout.world)).values())


@settings(max_examples=20)
@given(layouts(most_ranks=64))
def test_layouts_that_leave_lanes_empty_tile_too(layout: Layout) -> None:
    """More experts' places than experts, more lanes than rows: nobody trains so, and nothing is owned twice."""
    layout = Layout(layout.stage, cp=layout.cp, tp=layout.tp, ep=layout.ep, etp=layout.etp)
    model = ODD.model_copy(update={"num_attention_heads": 2 * layout.tp, "num_key_value_heads": layout.tp})
    assert all((owners == 1).all() for owners in count_owners(model, layout, range(layout.world)).values())
    assert all(pieces(model, layout, r) == bucketed(model, layout, r) for r in {0, layout.world // 2, layout.world - 1})


def test_edges_are_the_bounds_of_the_parts() -> None:
    for cuts in ownership(ODD, Layout(8, tp=4, ep=2)).cuts:
        for lane, ranks in enumerate(cuts.ranks):
            dim = cuts.dims[lane]
            bounds = [(cuts.box(int(rank)).start[dim], cuts.box(int(rank)).stop[dim]) for rank in ranks]
            assert bounds == list(zip(cuts.edges[lane], cuts.edges[lane][1:], strict=False))


def test_a_member_holds_its_own_and_those_it_is_second_owner_of() -> None:
    seating = Seating(Layout(4, ep=2), (7, 3, 5, 9), (2, 2, 0, None), spares=(11,))
    held = holdings(ODD, seating, 5)
    for name, boxes in held.items():
        owned = [pieces(ODD, seating.layout, rank).get(name) for rank in (2, 0, 1)]
        assert boxes == [box for box in owned if box is not None]
        assert all(a.intersect(b) is None for i, a in enumerate(boxes) for b in boxes[:i])
    assert holdings(ODD, seating, 9).keys() == pieces(ODD, seating.layout, 3).keys()
    assert holdings(ODD, seating, 11) == holdings(ODD, seating, 1) == {}


def test_parameters_stand_in_the_models_order() -> None:
    names = list(shards(ODD, Layout(1), 0))
    assert list(pieces(ODD, Layout(1), 0)) == names == list(ownership(ODD, Layout(6, ep=3)).names)
