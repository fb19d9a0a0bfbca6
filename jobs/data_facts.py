"""How is prepared data told: as facts for programs, as lines for people, and when is a source read too often?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from concertina.config import DataConfig, TrainingConfig

if TYPE_CHECKING:
    from concertina.data import Mixture, Sequences, TokenCorpus

__all__ = ["MOST_EPOCHS", "contents", "facts", "lines", "mixture_facts", "often_repeated", "part_rows"]

MOST_EPOCHS = 4.0
"""Text read up to so often teaches nearly as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""

EXCERPT_TOKENS = 60
COUNT_BLOCK_TOKENS = 1 << 24


def facts(corpus: TokenCorpus) -> dict[str, Any]:
    """What the manifest tells of one corpus."""
    manifest = corpus.manifest
    return {
        "fingerprint": corpus.fingerprint,
        "content_sha256": corpus.content_sha256,
        "sources": manifest.sources,
        "tokens": corpus.num_tokens,
        "documents": manifest.num_documents,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": manifest.text_bytes / corpus.num_tokens if manifest.text_bytes else None,
        "vocab_size": corpus.vocab_size,
    }


def contents(corpus: TokenCorpus, data: DataConfig, training: TrainingConfig | None) -> dict[str, Any]:
    """What only reading the tokens tells; with a job's training also how often it reads them."""
    import numpy as np

    counts = np.zeros(corpus.manifest.largest_token + 1, dtype=np.int64)
    for first in range(0, corpus.num_tokens, COUNT_BLOCK_TOKENS):
        counts += np.bincount(corpus.tokens[first : first + COUNT_BLOCK_TOKENS], minlength=len(counts))
    train, validation = corpus.sequences(data.sequence_length, data.validation_fraction)
    middle = int(corpus.documents[len(corpus.documents) // 2])
    ids = corpus.tokens[middle : middle + EXCERPT_TOKENS].tolist()
    return {
        "vocabulary_used": int((counts > 0).sum()),
        "sequence_length": data.sequence_length,
        "sequences": {"train": len(train), "validation": len(validation)},
        "epochs": training.steps * training.global_batch_size / len(train) if training else None,
        "excerpt": corpus.decode(ids),
        "excerpt_ids": ids,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """Both of these for people."""
    sources, sequences, epochs = facts["sources"], facts["sequences"], facts["epochs"]
    ratio = f", {facts['bytes_per_token']:.2f} bytes of text each" if facts["bytes_per_token"] else ""
    excerpt = facts["excerpt"] or f"(no tokenizer) {facts['excerpt_ids']}"
    return [
        facts["folder"],
        f"source      {', '.join(sources['source'])}: {sources['num_files']:,} files, {sources['num_bytes']:,} bytes",
        f"tokens      {facts['tokens']:,}{ratio}",
        f"documents   {facts['documents']:,}",
        f"vocabulary  {facts['vocabulary_used']:,} of {facts['vocab_size']:,} tokens occur",
        f"sequences   {sequences['train']:,} for training, {sequences['validation']:,} held out, "
        f"of {facts['sequence_length']} tokens",
        *([] if epochs is None else [f"epochs      {epochs:.2f} in all steps of the job"]),
        f"content     sha256 {facts['content_sha256'][:16]}",
        "excerpt",
        *(f"  | {line}" for line in excerpt.splitlines()),
    ]


def mixture_facts(mixture: Mixture, data: DataConfig, training: TrainingConfig | None) -> dict[str, Any]:
    """A mixture and its sources; with a job's training also what it draws of each."""
    from concertina.data import parts_of

    train, validation = mixture.sequences(data.sequence_length, data.validation_fraction)
    drawn = _drawn(train, training)
    sources = {}
    for part, held_out, corpus in zip(parts_of(train), parts_of(validation), mixture.corpora.values(), strict=True):
        sources[part.name] = {
            **facts(corpus),
            "sequences": {"train": len(part.sequences), "validation": len(held_out.sequences)},
            "weight": part.weight,
            "drawn": drawn.get(part.name),
            "epochs": drawn[part.name] / len(part.sequences) if drawn else None,
        }
    return {
        "folder": str(mixture.folder),
        "fingerprint": mixture.fingerprint,
        "tokens": mixture.num_tokens,
        "sequence_length": data.sequence_length,
        "mixture": sources,
        "warnings": often_repeated(train, training) if training else [],
    }


def part_rows(facts: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows), one row a source."""
    columns = ["source", "tokens", "sequences", "held out", "weight", "drawn", "epochs", "content"]
    rows = [
        [
            name,
            f"{part['tokens']:,}",
            f"{part['sequences']['train']:,}",
            f"{part['sequences']['validation']:,}",
            f"{part['weight']:.4g}",
            "" if part["drawn"] is None else f"{part['drawn']:,}",
            "" if part["epochs"] is None else f"{part['epochs']:.2f}",
            f"sha256 {part['content_sha256'][:12]}",
        ]
        for name, part in facts["mixture"].items()
    ]
    return columns, rows


def often_repeated(train: Sequences, training: TrainingConfig) -> list[str]:
    """One line for each source of a mixture that is read more than MOST_EPOCHS times, with the weight that mends it."""
    from concertina.data import parts_of

    found = []
    total = training.steps * training.global_batch_size
    drawn = _drawn(train, training)
    for part in parts_of(train):
        size, fair = len(part.sequences), MOST_EPOCHS * len(part.sequences) / total
        if drawn and drawn[part.name] > MOST_EPOCHS * size:
            found.append(
                f"source {part.name} is read {drawn[part.name] / size:.1f} times in {training.steps} steps: beyond "
                f"{MOST_EPOCHS:g} times text teaches little more (arXiv 2305.16264); give more of it, or make its "
                f"weight {fair:.2g} of all"
            )
    return found


def _drawn(train: Sequences, training: TrainingConfig | None) -> dict[str, int]:
    """Sequences that all steps draw, by source; empty without steps, or for a corpus alone."""
    from concertina.data.blend import BlendedSampler
    from concertina.data.mixture import make_sampler, parts_of

    if training is None:
        return {}
    sampler = make_sampler(train, training.global_batch_size, training.seed)
    total, names = training.steps * training.global_batch_size, [part.name for part in parts_of(train)]
    if not isinstance(sampler, BlendedSampler):
        return {}
    return {name: sampler.drawn(number, total) for number, name in enumerate(names)}
