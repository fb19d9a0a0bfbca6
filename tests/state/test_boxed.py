"""Does torch's checkpointing see one box of a global tensor, and can nothing else be done with it by mistake?"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from concertina.layout import Box
from concertina.state.boxed import BoxedTensor

pytestmark = pytest.mark.unit

BOX = Box((2, 0, 3), (4, 5, 4))


def boxed(dtype: torch.dtype = torch.float32) -> BoxedTensor:
    return BoxedTensor(torch.arange(10).view(2, 5, 1).to(dtype), BOX, (6, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_outwardly_it_is_the_global_tensor(dtype: torch.dtype) -> None:
    found = boxed(dtype)
    assert (tuple(found.shape), found.dtype, found.device.type) == ((6, 5, 4), dtype, "cpu")
    assert repr(found) == f"BoxedTensor((6, 5, 4), box=(2, 0, 3):(4, 5, 4), {dtype})"


def test_it_writes_its_box_and_no_more() -> None:
    (item,) = boxed().__create_write_items__("master/w", None)
    assert item.type is WriteItemType.SHARD
    assert item.index == MetadataIndex("master/w", torch.Size((2, 0, 3)))
    assert item.tensor_data is not None
    assert tuple(item.tensor_data.size) == (6, 5, 4)
    assert tuple(item.tensor_data.chunk.offsets) == BOX.start
    assert tuple(item.tensor_data.chunk.sizes) == BOX.shape
    assert item.tensor_data.properties.dtype == torch.float32


def test_it_reads_into_its_box_in_place() -> None:
    found = boxed()
    (chunk,) = found.__create_chunk_list__()
    assert (tuple(chunk.offsets), tuple(chunk.sizes)) == (BOX.start, BOX.shape)
    piece = found.__get_tensor_shard__(MetadataIndex("master/w", torch.Size(BOX.start)))
    assert piece is found.piece
    with pytest.raises(AssertionError):
        found.__get_tensor_shard__(MetadataIndex("master/w", torch.Size((0, 0, 0))))


def test_it_computes_nothing() -> None:
    found = boxed()
    for operation in (lambda: torch.add(found, 1), found.clone, found.zero_, lambda: found[0]):
        with pytest.raises(TypeError, match="only goes in and out of checkpoints"):
            operation()


def test_detaching_keeps_piece_and_box() -> None:
    """What torch's planners do to every tensor on the way."""
    found = boxed()
    flat, _ = flatten_state_dict({"master/w": found.detach()})
    assert flat["master/w"].piece is found.piece
    assert flat["master/w"].box == BOX
