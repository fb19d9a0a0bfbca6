"""Are tokens and document starts on disk what was given, with the right facts?"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from concertina.data.writer import TokenWriter
from concertina.errors import DataError

pytestmark = pytest.mark.unit


def test_documents_start_at_the_first_token_that_follows(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "uint32") as writer:
        for ids in ([1, 2, 3], [], [70_000], [5, 6]):
            writer.start_document()
            writer.add(np.array(ids, dtype=np.int64))
        writer.add(np.array([7]))
    assert np.fromfile(tmp_path / "tokens.bin", dtype=np.uint32).tolist() == [1, 2, 3, 70_000, 5, 6, 7]
    assert np.fromfile(tmp_path / "documents.bin", dtype=np.int64).tolist() == [0, 3, 4]
    assert (writer.num_tokens, writer.num_documents, writer.largest) == (7, 3, 70_000)
    for name, facts in writer.files.items():
        raw = (tmp_path / name).read_bytes()
        assert (facts.num_bytes, facts.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
        assert facts.mtime_ns == (tmp_path / name).stat().st_mtime_ns


def test_boundary_tokens_end_documents_across_blocks(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "uint16") as writer:
        writer.start_document()
        for block in ([1, 9, 2], [3, 9], [4], [9]):
            writer.add(np.array(block), document_token=9)
    assert np.fromfile(tmp_path / "documents.bin", dtype=np.int64).tolist() == [0, 2, 5]


def test_no_token_at_all_is_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus is empty"), TokenWriter(tmp_path, "uint16"):
        pass
