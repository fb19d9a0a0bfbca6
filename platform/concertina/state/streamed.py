"""How does a safetensors file come to storage without ever being in memory? Header first, then tensors one by one.

`StreamedPart` writes one so that it is a part of a checkpoint: for writers that have whole tensors, a few at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Private to torch, as all of this format: tests/state checks it against the pinned version.
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)

from concertina.layout import Box
from concertina.state.manifest import Part, record_file, record_part

__all__ = ["DTYPE_NAMES", "Entry", "StreamedPart", "TensorFile"]

Entry = tuple[torch.dtype, tuple[int, ...]]
"""What is known of a tensor before it is there."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_ALIGNMENT = 8


class TensorFile:
    """A safetensors file that grows. Every tensor of `entries` is to be written once, in any order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.entries = dict(entries)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        at = 0
        # Wide ones first: readers that map the file need every tensor aligned to its own elements.
        for name, (dtype, shape) in sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize):
            length = prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [at, at + length]}
            self._offsets[name] = at
            at += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + at)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place, rounded to the dtype that its entry has."""
        dtype, shape = self.entries[name]
        assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        self._file.seek(self._start + self._offsets.pop(name))
        flat = tensor.detach().to(dtype).contiguous().flatten()
        self._file.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """All tensors are there, and on storage."""
        assert not self._offsets, f"{self.path}: {len(self._offsets)} tensors were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class StreamedPart:
    """A checkpoint's only part, of whole tensors; its folder is committed when it is finished."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        offsets = {key: {SAVED_OFFSETS_KEY: [0] * len(shape)} for key, (_, shape) in entries.items()}
        metadata = {
            CUSTOM_METADATA_KEY: json.dumps(offsets),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
        self.folder = folder
        self._file = TensorFile(folder / _gen_file_name(1, 1, 1), entries, metadata)

    def write(self, key: str, tensor: Tensor) -> None:
        """As `TensorFile.write`."""
        self._file.write(key, tensor)

    def finish(self) -> Part:
        """The file is whole and on storage."""
        self._file.close()
        shapes = {key: shape for key, (_, shape) in self._file.entries.items()}
        whole = {key: Box.whole(shape) for key, shape in shapes.items()}
        part = Part(
            rank=0,
            world=1,
            generation=0,
            file=self._file.path.name,
            record=record_file(self._file.path),
            boxes={key: (box.start, box.stop) for key, box in whole.items()},
            shapes=shapes,
        )
        record_part(self.folder, part)
        return part
