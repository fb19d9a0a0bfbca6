"""How are tokens and document starts written, and their facts taken down while they pass by?"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from concertina.data.corpus import DOCUMENTS, TOKENS, FileFacts, TokenType
from concertina.errors import DataError

__all__ = ["TokenWriter"]


class HashedFile:
    """A file written from the first byte to the last, or one that is there and is read so, with its digest."""

    def __init__(self, path: Path, is_there: bool = False) -> None:
        self.path = path
        self.file = None if is_there else path.open("wb")
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: npt.NDArray[np.integer]) -> None:
        raw = data.tobytes()
        if self.file is not None:
            self.file.write(raw)
        self.digest.update(raw)
        self.num_bytes += len(raw)

    def close(self) -> FileFacts:
        """Flushed to the disk, so that the rename that follows cannot reveal a torn file after a power cut."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        return FileFacts(
            num_bytes=self.num_bytes, sha256=self.digest.hexdigest(), mtime_ns=self.path.stat().st_mtime_ns
        )


class TokenWriter:
    """Writes tokens.bin and documents.bin of a folder; `files` holds their facts after the `with` block. With
    `in_place`, which has the tokens that are added, only what is to be known of it is taken down."""

    def __init__(self, folder: Path, dtype: TokenType, in_place: Path | None = None) -> None:
        self.dtype: TokenType = dtype
        self.tokens_name = TOKENS if in_place is None else str(in_place)
        self.tokens = HashedFile(folder / self.tokens_name, is_there=in_place is not None)
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
        self.files = {self.tokens_name: self.tokens.close(), DOCUMENTS: self.documents.close()}
        if error is None and not self.num_tokens:
            raise DataError("the corpus is empty: its files gave no token; name files that hold text in data.source")

    def start_document(self) -> None:
        """The next token begins a document."""
        self._document_pending = True

    def add(
        self,
        tokens: npt.NDArray[np.integer],
        document_token: int | None = None,
        document_starts: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Append tokens; with `document_token`, a document starts after each of those, with `document_starts` at these
        places among them, ascending. Raises DataError for a number that is no token id."""
        if not len(tokens):
            return
        self._check_ids(tokens)
        starts = [0] if self._document_pending else []
        self._document_pending = False
        if document_token is not None:
            after = np.flatnonzero(tokens == document_token) + 1
            self._document_pending = bool(len(after)) and int(after[-1]) == len(tokens)
            starts = [*starts, *after[: len(after) - self._document_pending].tolist()]
        here = np.array(starts, dtype=np.int64) if document_starts is None else document_starts
        self.documents.write(here + self.num_tokens)
        self.tokens.write(tokens.astype(self.dtype, copy=False))
        self.num_documents += len(here)
        self.num_tokens += len(tokens)
        self.largest = max(self.largest, int(tokens.max()))

    def _check_ids(self, tokens: npt.NDArray[np.integer]) -> None:
        if int(tokens.min()) >= 0 and int(tokens.max()) < 1 << 32:
            return
        position = int(np.argmax((tokens < 0) | (tokens >= 1 << 32)))
        raise DataError(
            f"{tokens[position]} at position {self.num_tokens + position} is no token id: ids are 0 to 2^32 - 1; "
            "the files hold something else than tokens"
        )
