"""What may a job file say of its text: where it comes from, in which parts, and how it is cut into sequences?"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from concertina.config.section import Fraction, Misfits, NonNegative, Positive, Section

__all__ = ["DataConfig", "Format", "SourceConfig", "TokenizerConfig"]

Format = Literal["auto", "text", "jsonl", "parquet", "arrow", "nanogpt", "megatron"]
_SOURCE_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?")


class TokenizerConfig(Section):
    """How text becomes tokens."""

    path: str | None = None
    """A `tokenizer.json`; absent: a byte-level BPE is trained on the corpus, of a mixture on all sources together."""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Size of the trained BPE: 256 bytes, the end-of-text token, and merges."""


class SourceConfig(Section):
    """One source of a mixture. Keys that `data` has as well say it for this source alone; absent, `data`'s counts."""

    source: str | tuple[str, ...]
    """As `data.source`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the sequences drawn from it, over the sum of all weights; not a share of what there is: a small source
    is read several times."""
    format: Format | None = None
    text_field: str | None = None
    include: tuple[str, ...] | None = None
    document_token: NonNegative | None = None
    max_bytes: Positive | None = None


class DataConfig(Section):
    """The corpus and how it is cut into sequences."""

    source: str | tuple[str, ...] = "stdlib"
    """`stdlib` (the Python standard library's own source on this machine), files and folders, `hf:NAME` or
    `hf:NAME:SPLIT` (a dataset that the package `datasets` loads). Counts when there are no `sources`."""
    sources: dict[str, SourceConfig] | None = None
    """A mixture: sources by a name each, which metrics show; absent: `source` alone."""
    format: Format = "auto"
    """`auto` goes by the file's ending: .jsonl, .parquet, .arrow (Hugging Face), .bin (Megatron with an .idx beside it,
    else nanoGPT), everything else is text."""
    text_field: str = "text"
    """The field of a .jsonl line, or the column of a table, that holds the text."""
    include: tuple[str, ...] = ("*.txt", "*.md", "*.py", "*.jsonl", "*.parquet")
    """File name patterns taken from folders."""
    document_token: NonNegative | None = None
    """Token id that ends a document in a nanoGPT .bin (50256 in GPT-2's vocabulary); absent: one document a file."""
    max_bytes: Positive | None = None
    """Stop reading after this many bytes of text (of each source); absent: all of it."""
    sequence_length: Positive = 256
    """Tokens a sequence predicts."""
    document_mask: bool = False
    """Tokens see their own document only, not those before it in the sequence."""
    validation_fraction: Fraction = 0.02
    """Share of the sequences held out, of each source; never trained on."""
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        problems = []
        if self.sources is not None and not self.sources:
            problems.append(("sources", "a mixture needs at least one source: name one, or leave the key out"))
        # The default is what `dump_job` writes, and what a file that is extended may have said.
        if self.sources and self.source != DataConfig.model_fields["source"].default:
            text = f"source={self.source!r} and sources both say where the text comes from: keep one of the two"
            problems.append(("sources", text))
        for name in self.sources or ():
            if _SOURCE_NAME.fullmatch(name) is None:
                text = f"{name!r} is no name: up to 40 of a-z 0-9 _ -, a letter or digit at both ends"
                problems.append((f"sources.{name}", text))
        if problems:
            raise Misfits(problems)
        return self

    @property
    def parts(self) -> dict[str, DataConfig]:
        """Each source of a mixture as if it were the only one, by name, in alphabetical order: the order of keys in a
        file means nothing."""
        return {name: self._part(part) for name, part in sorted((self.sources or {}).items())}

    def _part(self, part: SourceConfig) -> DataConfig:
        said = {key: value for key, value in part if value is not None and key != "weight"}
        return self.model_copy(update={**said, "sources": None})
