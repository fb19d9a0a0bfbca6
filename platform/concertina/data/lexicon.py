"""Which tokenizer cuts the text of a job, all its sources alike, and what identifies it before it is trained?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from concertina.config import DataConfig, TokenizerConfig
from concertina.data.sources import SourceFile, read_pieces, text_bytes
from concertina.data.tokenizer import load_tokenizer, sample, train_tokenizer
from concertina.errors import DataError

__all__ = ["Lexicon", "Texts"]

Texts = tuple[Sequence[SourceFile], DataConfig]
"""Files of text, and how they are read."""


class Lexicon:
    """A tokenizer that is given, or trained on `texts` when it is first asked for.

    Of several texts each gives as much to the training as its part of all of them: weights of a mixture do not count,
    so that other weights cut nothing anew.
    """

    def __init__(self, config: TokenizerConfig, texts: Sequence[Texts]) -> None:
        self.config = config
        self.texts = texts
        self._made: Tokenizer | None = None

    @property
    def path(self) -> Path | None:
        """The file that is given. Raises DataError when it is not there."""
        if self.config.path is None:
            return None
        found = Path(self.config.path).expanduser().absolute()
        if not found.is_file():
            raise DataError(f"data.tokenizer.path: no file {found}; correct the path", path=str(found))
        return found

    @property
    def identity(self) -> list[str | int]:
        """Equal for equal tokenizers, without reading any text."""
        if self.path is not None:
            status = self.path.stat()
            return [str(self.path), status.st_size, status.st_mtime_ns]
        # A trained vocabulary may differ between versions of the library.
        found: list[str | int] = [self.config.vocab_size, tokenizers.__version__]
        if len(self.texts) > 1:
            read = [[_facts(file) for file in files] + [data.max_bytes, data.text_field] for files, data in self.texts]
            found.append(hashlib.sha256(json.dumps(read).encode()).hexdigest())
        return found

    @property
    def size(self) -> tuple[int, str]:
        """How many tokens it has, or will have at most, and where that number comes from."""
        if self.path is not None:
            return self.given().get_vocab_size(), str(self.config.path)
        return self.config.vocab_size, "data.tokenizer.vocab_size"

    def given(self) -> Tokenizer:
        """The one of the file. Raises DataError when it does not load."""
        assert self.path is not None
        return load_tokenizer(self.path)

    def tokenizer(self, begin: Callable[[int], None]) -> Tokenizer:
        """The tokenizer; `begin` hears how many bytes of text there are when it has to be trained."""
        if self._made is None:
            self._made = self.given() if self.path is not None else self._trained(begin)
        return self._made

    def take(self, path: Path) -> None:
        """It has been trained before, for another source: here it is."""
        if self._made is None:
            self._made = load_tokenizer(path)

    def _trained(self, begin: Callable[[int], None]) -> Tokenizer:
        total = sum(text_bytes(list(files), data) for files, data in self.texts)
        begin(total)
        pieces = (piece for files, data in self.texts for piece in read_pieces(list(files), data))
        return train_tokenizer(sample(pieces, total), self.config.vocab_size)


def _facts(file: SourceFile) -> list[str | int | None]:
    return [file.name, file.kind, file.num_bytes, file.mtime_ns]
