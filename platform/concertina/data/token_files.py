"""Which tokens and documents are in a file of tokens? nanoGPT's `.bin`, and Megatron's pair of `.bin` and `.idx`.

Megatron's index (megatron/core/datasets/indexed_dataset.py): `MMIDIDX\\0\\0`, version and code of the token type,
counts of sequences and documents, then int32 lengths, int64 byte offsets, and int64 numbers of the sequences at which
documents start, the last one their count. All little-endian; read as it lies on the disk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from concertina.errors import DataError

__all__ = ["TokenFile", "megatron_pair", "open_megatron", "open_nanogpt"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
BLOCK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """Tokens where they lie, memory-mapped. `starts`: positions at which documents start, ascending; None where the
    file does not say, and a token does."""

    path: Path
    tokens: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64] | None


def open_nanogpt(path: Path) -> TokenFile:
    """uint16 tokens and nothing else. Raises DataError for an odd number of bytes."""
    size = path.stat().st_size
    if size % 2:
        raise DataError(
            f"{path}: {size} bytes is not a whole number of uint16 tokens; "
            f"the file is cut short or not a nanoGPT .bin: write it again, or set data.format",
            path=str(path),
            num_bytes=size,
        )
    return TokenFile(path, _mapped(path, np.dtype("<u2"), size // 2), None)


def megatron_pair(path: Path) -> tuple[Path, Path] | None:
    """(.bin, .idx) that `path` means: one of the two, or what both names begin with; None when not both are there."""
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx")
    return pair if pair[0].is_file() and pair[1].is_file() else None


def open_megatron(path: Path) -> TokenFile:
    """The tokens of a `.bin` and the documents of the `.idx` beside it. Raises DataError when either is cut short, they
    are not of one pair, or hold something else."""
    index = path.with_suffix(".idx")
    dtype, num_sequences, num_documents = _read_header(index)
    offset = HEADER.size
    lengths = _mapped(index, np.dtype("<i4"), num_sequences, offset)
    pointers = _mapped(index, np.dtype("<i8"), num_sequences, offset + 4 * num_sequences)
    documents = _mapped(index, np.dtype("<i8"), num_documents, offset + 12 * num_sequences)
    _check_pair(path, index, dtype, lengths, pointers)
    tokens = _mapped(path, dtype, path.stat().st_size // dtype.itemsize)
    return TokenFile(path, tokens, _starts(index, documents, pointers, len(tokens), dtype))


def _read_header(index: Path) -> tuple[np.dtype[Any], int, int]:
    """Type of the tokens, number of sequences, and of entries in the list of documents."""
    size = index.stat().st_size
    with index.open("rb") as file:
        raw = file.read(HEADER.size)
    if not raw.startswith(MAGIC) or len(raw) < HEADER.size:
        raise _refusal(index, f"begins with {raw[:9]!r}, not with {MAGIC!r}: it is no index of Megatron's")
    _, version, code, num_sequences, num_documents = HEADER.unpack(raw)
    if version != 1:
        raise _refusal(index, f"is of version {version}, this reads version 1")
    if not DTYPES.get(code, "float").startswith(("int", "uint")):
        raise _refusal(index, f"says that its tokens are {DTYPES.get(code, f'of type {code}')}: token ids are integers")
    least = HEADER.size + 12 * num_sequences + 8 * num_documents
    if size not in (least, least + num_sequences):  # a mode for each sequence may follow
        raise _refusal(
            index, f"has {size} bytes, its {num_sequences} sequences and {num_documents} documents take {least}"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), num_sequences, num_documents


def _check_pair(path: Path, index: Path, dtype: np.dtype[Any], lengths: Any, pointers: Any) -> None:
    """Sequences lie one after another and end where the file does: only then are they the corpus as it is."""
    at = 0
    for first in range(0, len(lengths), BLOCK):
        ends = at + np.cumsum(lengths[first : first + BLOCK], dtype=np.int64) * dtype.itemsize
        starts = np.concatenate([[at], ends[:-1]])
        wrong = np.flatnonzero(pointers[first : first + BLOCK] != starts)
        if len(wrong):
            number = first + int(wrong[0])
            text = f"says that sequence {number} begins at byte {pointers[number]}, the one before ends at "
            raise _refusal(index, f"{text}{starts[wrong[0]]}")
        at = int(ends[-1])
    if at != (size := path.stat().st_size):
        raise _refusal(index, f"counts {at} bytes of {dtype.name} tokens, {path.name} has {size}")


def _starts(index: Path, documents: Any, pointers: Any, num_tokens: int, dtype: np.dtype[Any]) -> Any:
    """Positions in tokens; documents without tokens are left out."""
    if len(documents) and (np.any(np.diff(documents) < 0) or documents[0] != 0 or documents[-1] != len(pointers)):
        raise _refusal(index, f"lists documents that do not go from sequence 0 up to {len(pointers)}")
    firsts = documents[:-1][documents[:-1] < len(pointers)]
    starts = np.unique(pointers[firsts] // dtype.itemsize).astype(np.int64)
    return starts[starts < num_tokens]


def _mapped(path: Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> Any:
    if not count:
        return np.empty(0, dtype=dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _refusal(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}: copy or write the .bin and .idx again", path=str(path))
