"""How does torch.distributed.checkpoint see a piece that we describe by a box?

`BoxedTensor` implements DCP's `_Checkpointable` protocol: outwardly it has the global tensor's shape, and it holds
exactly one box of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from concertina.layout import Box

__all__ = ["BoxedTensor"]


class BoxedTensor(torch.Tensor):
    """A global tensor of which only `piece`, at `box`, is here. It computes nothing; DCP reads and writes the piece."""

    piece: Tensor
    box: Box

    @staticmethod
    def __new__(cls, piece: Tensor, box: Box, global_shape: tuple[int, ...]) -> BoxedTensor:
        outer = torch.Tensor._make_wrapper_subclass(cls, global_shape, dtype=piece.dtype, device=piece.device)
        outer.piece, outer.box = piece, box
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"a BoxedTensor only goes in and out of checkpoints; {func} was called on it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BoxedTensor({tuple(self.shape)}, box={self.box.start}:{self.box.stop}, {self.dtype})"

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.box.start), torch.Size(self.box.shape))

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.piece), self.size())
        index = MetadataIndex(fqn, torch.Size(self.box.start))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is None or tuple(index.offset) == self.box.start
        return self.piece
