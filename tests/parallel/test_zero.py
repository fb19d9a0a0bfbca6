"""Is every element of every parameter owned once, and do sums and weights come back to where they belong?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from concertina.layout import Box, Layout, Slot, plan_slots, split_dim
from concertina.parallel.groups import Group, GroupOptions, Groups, form_groups
from concertina.parallel.zero import Bucket
from tests.distributed import run_distributed

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def local_boxes(draw: st.DrawFn) -> dict[str, Box]:
    """Local boxes of parameters, anywhere in their global tensors, empty ones too."""
    found = {}
    for index, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=5))):
        start = tuple(draw(st.integers(0, 3)) for _ in shape)
        found[f"p{index}"] = Box(start, tuple(a + length for a, length in zip(start, shape, strict=True)))
    return found


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.unit
@given(boxes=local_boxes(), parts=st.integers(1, 6))
@example(boxes={"tied": Box.whole((2, 2)), "one": Box.whole((1,)), "none": Box.whole((0, 3))}, parts=5)
def test_the_slots_of_all_ranks_tile_every_parameter(boxes: dict[str, Box], parts: int) -> None:
    for name, local in boxes.items():
        owners = np.zeros(local.shape, dtype=int)
        for slots in plan_slots(boxes, parts):
            slot = slots[name]
            assert slot.name == name
            assert local.contains(slot.box)
            owners[slot.box.slices(within=local)] += 1
            along = [slice(None)] * len(local.shape)
            along[slot.dim] = slice(slot.start, slot.stop)
            assert owners[tuple(along)].shape == slot.shape == slot.box.shape
            assert slot.numel == slot.box.size
            assert tuple(along) == tuple(
                own if dim == slot.dim else slice(None) for dim, own in enumerate(slot.box.slices(within=local))
            )
        assert (owners == 1).all(), name


@pytest.mark.unit
@given(boxes=local_boxes(), parts=st.integers(1, 6))
def test_a_segment_holds_its_slots_one_after_the_other(boxes: dict[str, Box], parts: int) -> None:
    for slots in plan_slots(boxes, parts):
        assert list(slots) == list(boxes)
        end = 0
        for slot in slots.values():
            assert slot.offset == end
            end += slot.numel


@pytest.mark.unit
@given(boxes=local_boxes(), parts=st.integers(1, 6))
def test_no_rank_owns_more_than_a_row_above_another(boxes: dict[str, Box], parts: int) -> None:
    ranks = plan_slots(boxes, parts)
    for name in boxes:
        rows = [slots[name].stop - slots[name].start for slots in ranks]
        assert max(rows) - min(rows) <= 1
        assert rows == sorted(rows, reverse=True)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("shape", "parts", "dim"),
    [
        ((5, 3), 2, 0),
        ((2, 8), 4, 1),
        ((4, 9), 4, 0),  # the first that has enough, not the longest
        ((2, 3, 4), 4, 2),
        ((2, 3), 4, 1),  # none has enough: the longest
        ((3, 3), 4, 0),  # and of equals the first
        ((0, 2), 3, 1),
        ((1,), 1, 0),
    ],
)
def test_the_dimension_that_is_cut(shape: tuple[int, ...], parts: int, dim: int) -> None:
    assert split_dim(shape, parts) == dim


@pytest.mark.unit
def test_a_scalar_cannot_be_cut() -> None:
    with pytest.raises(AssertionError, match="scalar"):
        split_dim((), 1)


# -- a bucket of one rank ----------------------------------------------------------------------------------------------


def bucket_of(parameters: dict[str, Tensor], group: Group) -> Bucket:
    return Bucket(parameters, {name: Box.whole(tuple(p.shape)) for name, p in parameters.items()}, group, 0.0)


@pytest.mark.unit
def test_micro_batches_add_up_and_a_parameter_without_gradient_counts_as_zero() -> None:
    bucket = bucket_of({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, Group.alone())
    for expected_b in (3.0, 0.0):  # the second step must not see the first one's
        bucket.accumulate("a", torch.full((2, 3), 1.0))
        bucket.accumulate("a", torch.full((2, 3), 4.0))
        if expected_b:
            bucket.accumulate("b", torch.full((4,), expected_b))
        bucket.start_reduce()
        assert bucket.finish_reduce().tolist() == [5.0] * 6 + [expected_b] * 4


@pytest.mark.unit
def test_gradients_are_summed_and_masters_kept_in_fp32_at_least() -> None:
    for dtype, kept in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        bucket = bucket_of({"a": torch.full((3,), 1.5, dtype=dtype)}, Group.alone())
        assert bucket.master().dtype == bucket.shard.dtype == kept
        assert bucket.master().tolist() == [1.5] * 3
        bucket.accumulate("a", torch.ones(3, dtype=dtype))
        for _ in range(300):  # bfloat16 alone would stand still at 256
            bucket.accumulate("a", torch.ones(3, dtype=dtype))
        bucket.start_reduce()
        assert bucket.finish_reduce().tolist() == [301.0] * 3


@pytest.mark.unit
def test_a_master_is_a_copy() -> None:
    weights = torch.ones(3)
    master = bucket_of({"a": weights}, Group.alone()).master()
    master += 1
    assert weights.tolist() == [1.0] * 3


# -- ranks: gradients there, weights back ------------------------------------------------------------------------------

# Uneven in every dimension for 2, 3 and 4 ranks; with fewer rows than ranks; empty.
SHAPES = {"a": (5, 3), "b": (7,), "c": (1, 9), "d": (2, 1), "e": (3, 2, 2), "none": (0, 4)}


def gradient(name: str, rank: int, step: int) -> Tensor:
    """Whole numbers, exact in bfloat16."""
    shape = SHAPES[name]
    values = torch.arange(torch.Size(shape).numel()) * 5 % 13 + rank * (step + 1) + ord(name[0]) - 97
    return values.view(shape)


def expected_sum(name: str, world: int, step: int) -> Tensor:
    return sum((gradient(name, rank, step) for rank in range(world)), torch.zeros(SHAPES[name], dtype=torch.int64))


def first_weights(name: str) -> Tensor:
    return (torch.arange(torch.Size(SHAPES[name]).numel()) * 7 % 29 + 1).view(SHAPES[name])


def weights_at(name: str, world: int, steps: int) -> Tensor:
    """A step adds a 64th of the summed gradients, rounded to whole numbers, to the weights."""
    start = first_weights(name)
    return start + sum((expected_sum(name, world, step) // 64 for step in range(steps)), torch.zeros_like(start))


def check_steps(group: Group, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    parameters = {name: first_weights(name).to(dtype) for name in names}
    bucket = bucket_of(parameters, group)
    master = bucket.master()
    for step in range(3):
        for name in names:
            bucket.accumulate(name, gradient(name, group.rank, step).to(dtype))
        bucket.start_reduce()
        shard = bucket.finish_reduce()
        check_shard(bucket, shard, step)
        master += shard // 64
        bucket.start_gather(master).finish()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, weights_at(name, group.size, step + 1).to(dtype)), name


def check_shard(bucket: Bucket, shard: Tensor, step: int) -> None:
    """Every piece is the sum over ranks at its box; what no piece covers is zero, or it would count in the norm."""
    size, length = bucket.group.size, shard.numel()
    covered = torch.zeros(length, dtype=torch.bool)
    for name, (slot, view) in bucket.own_views(shard).items():
        assert torch.equal(view.to(torch.int64), expected_sum(name, size, step)[slot.box.slices()]), name
        assert view.data_ptr() == shard.data_ptr() + slot.offset * shard.element_size(), "live, not a copy"
        covered[slot.offset : slot.offset + slot.numel] = True
    assert (shard[~covered] == 0).all(), f"padding: {shard[~covered].tolist()}"


def check_one_rank_without_gradients(group: Group) -> None:
    """Rank 0 had no tokens for `b`: the others' sum arrives all the same."""
    bucket = bucket_of({"b": torch.zeros(7), "e": torch.zeros(3, 2, 2)}, group)
    for name in ("e",) if group.rank == 0 else ("b", "e"):
        bucket.accumulate(name, gradient(name, group.rank, 0).float())
    bucket.start_reduce()
    shard = bucket.finish_reduce()
    total = expected_sum("b", group.size, 0) - gradient("b", 0, 0)
    slot, view = bucket.own_views(shard)["b"]
    assert torch.equal(view, total[slot.box.slices()].float())


def round_trips(rank: int, store: Any) -> list[tuple[int, int]]:
    """Worlds of one to four on the same four processes; a world's number is its generation. Segments' lengths."""
    lengths = []
    for world in range(1, 5):
        if rank >= world:
            continue
        groups = form_groups(Layout(world), rank, store, GroupOptions(world)) if world > 1 else Groups.alone()
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            check_steps(groups["dp_cp"], dtype, tuple(SHAPES))
            check_steps(groups["dp_cp"], dtype, ("a",))  # little beside its padding
        if world > 1:
            check_one_rank_without_gradients(groups["dp_cp"])
        bucket = bucket_of({name: torch.zeros(shape) for name, shape in SHAPES.items()}, groups.world)
        lengths.append((world, bucket.shard.numel()))
    return lengths


@pytest.mark.dist
def test_sums_reach_their_owners_and_weights_everyone() -> None:
    found = run_distributed(round_trips, 4)
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert dict(found[0])[1] == total
    assert all(total <= world * length for world, length in found[0])
    assert [dict(lengths)[4] for lengths in found] == [dict(found[0])[4]] * 4, "one padded length for all ranks"


@pytest.mark.unit
def test_a_slot_knows_its_size() -> None:
    assert Slot("a", 0, 1, 3, 4, (2, 5), Box((1, 0), (3, 5))).numel == 10
