"""What is on disk once text has become tokens, and is it whole?

A folder: `tokens.bin` (flat uint16 or uint32; absent where one token file of somebody else's is read in its place),
`documents.bin` (int64, the position at which each document starts), `tokenizer.json` (absent for token files that come
without one) and `manifest.json`, which says what the others must be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from concertina.data.sequences import Split, split_windows
from concertina.data.tokenizer import load_tokenizer
from concertina.errors import DataError

__all__ = [
    "DOCUMENTS",
    "MANIFEST",
    "TOKENIZER",
    "TOKENS",
    "FileFacts",
    "Manifest",
    "TokenCorpus",
    "TokenType",
    "sha256_of",
]

MANIFEST, TOKENS, DOCUMENTS, TOKENIZER = "manifest.json", "tokens.bin", "documents.bin", "tokenizer.json"

TokenType = Literal["uint16", "uint32", "uint8", "int8", "int16", "int32", "int64"]
"""The first two are what is written here."""


class FileFacts(BaseModel):
    """What one file of the folder was when it was written."""

    model_config = ConfigDict(frozen=True)

    num_bytes: int
    sha256: str
    mtime_ns: int


class Manifest(BaseModel):
    """The corpus in numbers. Unknown keys of later versions are ignored, another format_version is refused."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = 1
    fingerprint: str
    dtype: TokenType
    tokens: str = TOKENS
    """File of the tokens: in the folder, or an absolute path outside."""
    num_tokens: int
    num_documents: int
    text_bytes: int | None
    vocab_size: int
    largest_token: int
    end_of_text: int | None
    sources: dict[str, str | int | list[str] | None]
    files: dict[str, FileFacts]


class TokenCorpus:
    """Tokens of a prepared corpus, memory-mapped: opening it costs nothing, whatever its size."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokens: npt.NDArray[np.integer] = np.memmap(folder / manifest.tokens, dtype=manifest.dtype, mode="r")
        self.documents: npt.NDArray[np.int64] = np.memmap(folder / DOCUMENTS, dtype=np.int64, mode="r")

    @classmethod
    def open(cls, folder: Path | str) -> TokenCorpus:
        """The corpus in `folder`. Raises DataError, one line, when a file is missing, cut short or altered.

        Sizes are always compared; contents (sha256) only when a file's modification time is not the one in the
        manifest, as after a copy: reading a large corpus at each start would cost minutes. `verify` always does.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, facts in manifest.files.items():
            _check(folder, name, facts, always_read=False)
        return cls(folder, manifest)

    def verify(self) -> None:
        """Read every file and compare it with the manifest; DataError for the first that differs."""
        for name, facts in self.manifest.files.items():
            _check(self.folder, name, facts, always_read=True)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal characters that name sources and settings; also the folder's name."""
        return self.manifest.fingerprint

    @property
    def content_sha256(self) -> str:
        """Of the tokens themselves: equal on two machines even where files have other paths or times."""
        return self.manifest.files[self.manifest.tokens].sha256

    @property
    def vocab_size(self) -> int:
        """The tokenizer's; for token files, which come without one, the largest token id plus one."""
        return self.manifest.vocab_size

    @property
    def tokenizer_file(self) -> Path | None:
        """Where it has one."""
        return self.folder / TOKENIZER if TOKENIZER in self.manifest.files else None

    @property
    def num_tokens(self) -> int:
        """All tokens, ends of text included."""
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        """Places at which one starts."""
        return self.manifest.num_documents

    def sequences(self, sequence_length: int, validation_fraction: float) -> Split:
        """(train, validation): windows of `sequence_length` tokens that share no token between the two."""
        return split_windows(self.tokens, self.documents, sequence_length, validation_fraction)

    def check_vocabulary(self, vocab_size: int) -> None:
        """DataError unless every token id is a row of an embedding with `vocab_size` rows."""
        if self.manifest.largest_token < vocab_size:
            return
        position = int(np.argmax(self.tokens >= vocab_size))
        token, largest = int(self.tokens[position]), self.manifest.largest_token
        raise DataError(
            f"token id {token} at position {position} of the corpus is out of vocabulary: "
            f"model.vocab_size={vocab_size} has ids 0 to {vocab_size - 1}, the corpus goes up to {largest}; "
            f"set model.vocab_size to {largest + 1} or more",
            token=token,
            position=position,
            vocab_size=vocab_size,
            largest_token=largest,
        )

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text of token ids; None where the corpus has no tokenizer."""
        if self.tokenizer_file is None:
            return None
        text: str = load_tokenizer(self.tokenizer_file).decode(list(ids), skip_special_tokens=False)
        return text


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a prepared corpus: it has no {MANIFEST}; run `concertina data prepare`")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; {_remedy(folder)}", path=str(path)) from error
    if missing := {manifest.tokens, DOCUMENTS} - set(manifest.files):
        raise DataError(f"{path} does not list {', '.join(sorted(missing))}; {_remedy(folder)}", path=str(path))
    return manifest


def _check(folder: Path, name: str, facts: FileFacts, always_read: bool) -> None:
    path = folder / name  # of an absolute name it is that name
    if not path.is_file():
        raise DataError(f"{path} is missing; {_remedy(folder)}", path=str(path))
    status = path.stat()
    if status.st_size != facts.num_bytes:
        what = "truncated" if status.st_size < facts.num_bytes else "longer than written"
        raise DataError(
            f"{path} is {what}: {MANIFEST} says {facts.num_bytes} bytes, the file has {status.st_size}; "
            f"{_remedy(folder)}",
            path=str(path),
            expected_bytes=facts.num_bytes,
            num_bytes=status.st_size,
        )
    if (always_read or status.st_mtime_ns != facts.mtime_ns) and (found := sha256_of(path)) != facts.sha256:
        raise DataError(
            f"{path} was altered: {MANIFEST} says sha256 {facts.sha256[:12]}, the file has {found[:12]}; "
            f"{_remedy(folder)}",
            path=str(path),
        )


def _remedy(folder: Path) -> str:
    return f"delete the folder {folder} and run `concertina data prepare` again"
