"""Are tokens and documents those of the file, and is every file that is not what it should be refused with numbers?"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from concertina.data.token_files import megatron_pair, open_megatron, open_nanogpt
from concertina.errors import DataError

pytestmark = pytest.mark.unit

# Written by Megatron-Core 0.16.1's IndexedDatasetBuilder: documents [11 12 13] + [14], [15], [16 17].
INDEX = bytes.fromhex(
    "4d4d49444944580000010000000000000008040000000000000004000000000000000300000001000000010000000200000000000000"
    "00000000060000000000000008000000000000000a000000000000000000000000000000020000000000000003000000000000000400"
    "000000000000"
)
TOKENS = bytes.fromhex("0b000c000d000e000f0010001100")


def write_pair(
    folder: Path,
    documents: list[list[list[int]]],
    code: int = 4,
    dtype: str = "<i4",
    pointers: list[int] | None = None,
    more: bytes = b"",
) -> Path:
    """A pair as Megatron writes it; a document is a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    size = np.dtype(dtype).itemsize
    offsets = np.cumsum([0, *lengths[:-1].tolist()]) * size if pointers is None else np.array(pointers)
    firsts = np.cumsum([0, *(len(document) for document in documents)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sequences), len(firsts))
    arrays = (lengths, offsets.astype("<i8"), firsts.astype("<i8"))
    (folder / "d.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays) + more)
    np.array([token for sequence in sequences for token in sequence], dtype=dtype).tofile(folder / "d.bin")
    return folder / "d.bin"


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_megatron(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_megatron_wrote(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(INDEX)
    (tmp_path / "d.bin").write_bytes(TOKENS)
    found = open_megatron(tmp_path / "d.bin")
    assert found.tokens.tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert found.starts is not None
    assert found.starts.tolist() == [0, 4, 5]
    assert found.tokens.dtype == np.uint16
    assert isinstance(found.tokens, np.memmap), "read where it lies"


def test_ours_is_what_megatron_writes(tmp_path: Path) -> None:
    """Else the other tests would prove nothing."""
    write_pair(tmp_path, [[[11, 12, 13], [14]], [[15]], [[16, 17]]], code=8, dtype="<u2")
    assert (tmp_path / "d.idx").read_bytes() == INDEX
    assert (tmp_path / "d.bin").read_bytes() == TOKENS


def test_documents_without_tokens_are_none(tmp_path: Path) -> None:
    found = open_megatron(write_pair(tmp_path, [[[]], [[1, 2]], [], [[3]], [[]]], more=bytes(4)))
    assert found.tokens.tolist() == [1, 2, 3]
    assert found.starts is not None
    assert found.starts.tolist() == [0, 2]


def test_a_pair_has_three_names(tmp_path: Path) -> None:
    path = write_pair(tmp_path, [[[1]]])
    for name in ("d", "d.bin", "d.idx"):
        assert megatron_pair(tmp_path / name) == (path, tmp_path / "d.idx")
    (tmp_path / "d.idx").unlink()
    assert megatron_pair(path) is None


def test_bad_pairs(tmp_path: Path) -> None:
    path = write_pair(tmp_path, [[[1, 2, 3]], [[4]]])
    index, whole = tmp_path / "d.idx", (tmp_path / "d.idx").read_bytes()
    path.write_bytes(path.read_bytes()[:-4])
    assert "counts 16 bytes of int32 tokens, d.bin has 12" in refusal(path)
    index.write_bytes(whole[:-8])
    assert f"has {len(whole) - 8} bytes, its 2 sequences and 3 documents take {len(whole)}" in refusal(path)
    index.write_bytes(whole[:20])
    assert "it is no index of Megatron's" in refusal(path)
    index.write_bytes(b"PK" + whole[2:])
    assert "begins with b'PKIDIDX" in refusal(path)
    index.write_bytes(whole[:9] + b"\2" + whole[10:])
    assert "is of version 2, this reads version 1" in refusal(path)
    path = write_pair(tmp_path, [[[1, 2, 3]], [[4]]])
    index.write_bytes(whole[:-16] + struct.pack("<qq", 2, 1))
    assert "documents that do not go from sequence 0 up to 2" in refusal(path)


@pytest.mark.parametrize(("code", "said"), [(6, "float64"), (7, "float32"), (9, "of type 9")])
def test_numbers_that_are_no_token_ids(code: int, said: str, tmp_path: Path) -> None:
    assert f"says that its tokens are {said}: token ids are integers" in refusal(write_pair(tmp_path, [[[1]]], code))


def test_sequences_that_do_not_follow_one_another(tmp_path: Path) -> None:
    path = write_pair(tmp_path, [[[1, 2]], [[3]]], pointers=[0, 4])
    assert "says that sequence 1 begins at byte 4, the one before ends at 8" in refusal(path)


def test_nanogpt_says_nothing_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(TOKENS)
    found = open_nanogpt(path)
    assert found.tokens.tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert found.starts is None
    path.write_bytes(TOKENS[:-1])
    with pytest.raises(DataError, match="13 bytes is not a whole number of uint16 tokens"):
        open_nanogpt(path)
