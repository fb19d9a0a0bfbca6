"""How do tensors get into a checkpoint and out of it, under any layout?

One safetensors file a rank in torch.distributed.checkpoint's Hugging Face format; no pickle anywhere. What makes the
folder a checkpoint is in `manifest.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan

from concertina.errors import CheckpointError
from concertina.state.boxed import BoxedTensor
from concertina.state.manifest import Part, read_manifest, record_file, record_part

__all__ = ["load_boxes", "write_part"]


class _RankWriter(HuggingFaceStorageWriter):
    """DCP's writer for one rank that plans alone: ranks know their boxes, so nothing needs to be gathered."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.shard_index = rank + 1  # not `rank`: DCP sets an attribute of that name

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data={"shard_index": self.shard_index}) for plan in plans]


def write_part(folder: Path, state: dict[str, BoxedTensor], *, rank: int, world: int, generation: int) -> Part:
    """Write one rank's boxes into a partial folder, durable before it returns. No collective.

    Raises CheckpointError or OSError when storage refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        dcp.save(dict(state), storage_writer=_RankWriter(folder, rank), no_dist=True)
    written = sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    assert len(written) == 1, f"rank {rank} wrote {len(written)} files"
    part = Part(
        rank=rank,
        world=world,
        generation=generation,
        file=written[0].name,
        record=record_file(written[0]),
        boxes={key: (boxed.box.start, boxed.box.stop) for key, boxed in state.items()},
        shapes={key: tuple(boxed.shape) for key, boxed in state.items()},
    )
    record_part(folder, part)
    return part


def load_boxes(folder: Path, state: dict[str, BoxedTensor]) -> None:
    """Fill the boxes of `state` in place from a checkpoint of any layout. No collective.

    Raises CheckpointError when a tensor is missing, has another shape, or cannot be read.
    """
    shapes = read_manifest(folder).shapes
    for key, boxed in state.items():
        if key not in shapes:
            raise CheckpointError(f"{folder}: has no tensor {key}: another model's checkpoint?", tensor=key)
        if shapes[key] != tuple(boxed.shape):
            raise CheckpointError(
                f"{folder}: {key} has shape {shapes[key]}, the model wants {tuple(boxed.shape)}", tensor=key
            )
    with _alone(folder):
        dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """DCP warns that it runs in one process only; that is what is meant here.

    What goes wrong inside DCP comes out as a BaseException, which no `except Exception` sees: here it gets its cause's
    words and our class.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{folder}: {type(cause).__name__}: {cause}") from cause
