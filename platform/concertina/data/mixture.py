"""What is a mixture? Corpora with a name and a weight each, which read as one.

A folder beside the corpora's, named by a fingerprint of names, weights and theirs: `mixture.json`, and the
`tokenizer.json` of all text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from concertina.data.blend import BlendedSampler
from concertina.data.corpus import TOKENIZER, TokenCorpus
from concertina.data.sampler import GlobalSampler, Sampler
from concertina.data.sequences import Sequences, Split
from concertina.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["MIXTURE", "Mixture", "MixtureManifest", "MixtureView", "Part", "make_sampler", "open_corpus", "parts_of"]

MIXTURE = "mixture.json"


class PartFacts(BaseModel):
    """One corpus: its weight as it was written, and its fingerprint, which is its folder's name."""

    model_config = ConfigDict(frozen=True)

    name: str
    weight: float
    corpus: str


class MixtureManifest(BaseModel):
    """`mixture.json`."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = 1
    fingerprint: str
    parts: tuple[PartFacts, ...]

    @classmethod
    def of(cls, parts: Mapping[str, tuple[float, str]]) -> MixtureManifest:
        """(weight, fingerprint of the corpus) by name, in the order in which sequences are numbered."""
        facts = [PartFacts(name=name, weight=weight, corpus=corpus) for name, (weight, corpus) in parts.items()]
        text = json.dumps(["mixture", 1, *(list(part.model_dump().values()) for part in facts)])
        return cls(fingerprint=hashlib.sha256(text.encode()).hexdigest()[:32], parts=tuple(facts))


@dataclass(frozen=True)
class Part:
    """One source of a mixture, or the only one there is, whose name is empty. `weight` is over the sum of all."""

    name: str
    weight: float
    sequences: Sequences


class MixtureView:
    """The sequences of one split of all sources: ids number one source's after another's."""

    def __init__(self, parts: Sequence[Part], weights: Sequence[float]) -> None:
        """`weights` as they are written: their exact proportion is the order's."""
        self.parts = tuple(parts)
        self.weights = tuple(weights)

    def __len__(self) -> int:
        return sum(len(part.sequences) for part in self.parts)

    def place(self, index: int) -> tuple[Part, int]:
        """Whose sequence an id is, and its id there."""
        assert 0 <= index < len(self), (index, len(self))
        for part in self.parts:
            if index < len(part.sequences):
                return part, index
            index -= len(part.sequences)
        raise AssertionError(index)

    def document_starts(self, index: int) -> list[int]:
        """As of its source."""
        part, inside = self.place(index)
        return part.sequences.document_starts(inside)

    def read(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens_BS, targets_BS), as of each one's source."""
        import torch

        if not ids:
            return self.parts[0].sequences.read(ids)
        rows = [part.sequences.read([inside]) for part, inside in map(self.place, ids)]
        tokens, targets = zip(*rows, strict=True)
        return torch.cat(tokens), torch.cat(targets)

    def starts(self, ids: Sequence[int]) -> torch.Tensor:
        """starts_BS, as of each one's source."""
        import torch

        return torch.cat([part.sequences.starts([inside]) for part, inside in map(self.place, ids)])


class Mixture:
    """The corpora of a mixture, opened."""

    def __init__(self, folder: Path, manifest: MixtureManifest, corpora: Sequence[TokenCorpus]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.corpora = {part.name: corpus for part, corpus in zip(manifest.parts, corpora, strict=True)}

    @classmethod
    def open(cls, folder: Path) -> Mixture:
        """Raises DataError, one line, when it or one of its corpora is missing or altered."""
        path = folder / MIXTURE
        try:
            manifest = MixtureManifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise DataError(
                f"{path}: {said}; delete the folder {folder} and run `concertina data prepare` again", path=str(path)
            ) from error
        return cls(folder, manifest, [TokenCorpus.open(folder.parent / part.corpus) for part in manifest.parts])

    @property
    def fingerprint(self) -> str:
        """Of names, weights and corpora."""
        return self.manifest.fingerprint

    @property
    def tokenizer_file(self) -> Path | None:
        """The one of all its text; None where there are tokens only, without."""
        path = self.folder / TOKENIZER
        return path if path.is_file() else None

    @property
    def num_tokens(self) -> int:
        """Of all sources, once each."""
        return sum(corpus.num_tokens for corpus in self.corpora.values())

    @property
    def num_documents(self) -> int:
        """Of all sources."""
        return sum(corpus.num_documents for corpus in self.corpora.values())

    @property
    def weights(self) -> dict[str, float]:
        """Of each source, over the sum of all."""
        total = sum(part.weight for part in self.manifest.parts)
        return {part.name: part.weight / total for part in self.manifest.parts}

    def verify(self) -> None:
        """Read every file of every corpus; DataError for the first that differs."""
        for corpus in self.corpora.values():
            corpus.verify()

    def sequences(self, sequence_length: int, validation_fraction: float) -> Split:
        """(train, validation), both of all sources: of each the same share is held out, by the same rule."""
        splits = {}
        for name, corpus in self.corpora.items():
            try:
                splits[name] = corpus.sequences(sequence_length, validation_fraction)
            except DataError as error:
                raise DataError(f"source {name}: {error.message}", **error.data) from error
        views = []
        for side in (0, 1):
            parts = [Part(name, weight, splits[name][side]) for name, weight in self.weights.items()]
            views.append(MixtureView(parts, [part.weight for part in self.manifest.parts]))
        return Split(*views)


def open_corpus(folder: Path | str) -> TokenCorpus | Mixture:
    """What `prepare` has left in a folder."""
    folder = Path(folder)
    return Mixture.open(folder) if (folder / MIXTURE).exists() else TokenCorpus.open(folder)


def parts_of(view: Sequences) -> tuple[Part, ...]:
    """The sources of a view; of a corpus alone that one, with no name."""
    return view.parts if isinstance(view, MixtureView) else (Part("", 1.0, view),)


def make_sampler(view: Sequences, global_batch_size: int, seed: int) -> Sampler:
    """The order in which a run reads a view. Raises DataError when there is nothing to draw from."""
    if not isinstance(view, MixtureView):
        return GlobalSampler(len(view), global_batch_size, seed)
    return BlendedSampler([len(part.sequences) for part in view.parts], view.weights, global_batch_size, seed)
