"""How are tokens and document starts written, and their facts taken down while they pass by?"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from concertina.data.corpus import DOCUMENTS, TOKENS, FileFacts
from concertina.errors import DataError

__all__ = ["TokenWriter"]


class HashedFile:
    """A file written from the first byte to the last, with its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: npt.NDArray[np.integer]) -> None:
        raw = data.tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.num_bytes += len(raw)

    def close(self) -> FileFacts:
        """Flushed to the disk, so that the rename that follows cannot reveal a torn file after a power cut."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return FileFacts(
            num_bytes=self.num_bytes, sha256=self.digest.hexdigest(), mtime_ns=self.path.stat().st_mtime_ns
        )


class TokenWriter:
    """Writes tokens.bin and documents.bin of a folder; `files` holds their facts after the `with` block."""

    def __init__(self, folder: Path, dtype: Literal["uint16", "uint32"]) -> None:
        self.dtype: Literal["uint16", "uint32"] = dtype
        self.tokens = HashedFile(folder / TOKENS)
        self.documents = HashedFile(folder / DOCUMENTS)
        self.num_tokens = 0
        self.num_documents = 0
        self.largest = -1
        self.files: dict[str, FileFacts] = {}
        self._document_pending = False

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files = {TOKENS: self.tokens.close(), DOCUMENTS: self.documents.close()}
        if error is None and not self.num_tokens:
            raise DataError("the corpus is empty: its files gave no token; name files that hold text in data.source")

    def start_document(self) -> None:
        """The next token begins a document."""
        self._document_pending = True

    def add(self, tokens: npt.NDArray[np.integer], document_token: int | None = None) -> None:
        """Append tokens; with `document_token`, a document starts after each of those."""
        if not len(tokens):
            return
        starts = [0] if self._document_pending else []
        self._document_pending = False
        if document_token is not None:
            after = np.flatnonzero(tokens == document_token) + 1
            self._document_pending = bool(len(after)) and int(after[-1]) == len(tokens)
            starts = [*starts, *after[: len(after) - self._document_pending].tolist()]
        self.documents.write(np.array(starts, dtype=np.int64) + self.num_tokens)
        self.tokens.write(tokens.astype(self.dtype))
        self.num_documents += len(starts)
        self.num_tokens += len(tokens)
        self.largest = max(self.largest, int(tokens.max()))
