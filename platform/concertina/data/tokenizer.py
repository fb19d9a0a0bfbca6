"""How does text become token ids? A byte-level BPE trained on the corpus, or a tokenizer.json that is given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from concertina.data.sources import Piece
from concertina.errors import DataError

__all__ = [
    "END_OF_TEXT",
    "TRAINING_SAMPLE_BYTES",
    "all_cores",
    "end_of_text_id",
    "load_tokenizer",
    "moved_token",
    "sample",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
# The merges of a few thousand tokens settle long before this: training time is bounded, whatever the corpus.
TRAINING_SAMPLE_BYTES = 8_000_000
PARALLELISM = "TOKENIZERS_PARALLELISM"
# The library takes it as "false". Nobody else writes it so: found at the next call, it is ours, not the user's.
AFTERWARDS = "off"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: END_OF_TEXT is id 0, then the 256 bytes, then merges by frequency. No text is unknown to it.

    Deterministic for equal texts. Small corpora end with fewer than `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as written by Hugging Face's `tokenizers`; truncation and padding it may ask for are off."""
    if not path.is_file():
        raise DataError(f"data.tokenizer.path: no file {path}; correct the path", path=str(path))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # `tokenizers` raises bare Exception for a file it cannot read: there is no narrower class to name.
    except Exception as error:
        raise DataError(
            f"data.tokenizer.path: {path} ({path.stat().st_size} bytes) does not load as a tokenizer.json: "
            f"{str(error).splitlines()[0]}; save it again with tokenizer.save, or leave the key out to train one",
            path=str(path),
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def moved_token(before: Path, now: Path) -> tuple[str, int, int | None] | None:
    """The first token (by id) that one tokenizer.json has under another id than the other, or that is gone from it:
    (token, id before, id now). None when the second is the first, with more tokens or without."""
    old, new = (load_tokenizer(path).get_vocab() for path in (before, now))
    for token, number in sorted(old.items(), key=lambda entry: entry[1]):
        if new.get(token) != number:
            return token, number, new.get(token)
    return None


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that ends a document; None where the vocabulary has none of the known ones."""
    ids = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, *OTHER_ENDS))
    return next((i for i in ids if i is not None), None)


def sample(pieces: Iterable[Piece], total_bytes: int, limit_bytes: int = TRAINING_SAMPLE_BYTES) -> Iterator[str]:
    """About `limit_bytes` of the text, spread evenly over the corpus; all of it where it is smaller."""
    seen = taken = 0
    for piece in pieces:
        if taken * total_bytes <= seen * limit_bytes:
            taken += piece.num_bytes
            yield piece.text
        seen += piece.num_bytes


@contextmanager
def all_cores() -> Iterator[None]:
    """`tokenizers` may use its threads inside, and stays silent when this process forks later.

    The library reads the variable at each call; left unset, it warns at every fork after parallel work. A value the
    user has set stays.
    """
    if os.environ.get(PARALLELISM, AFTERWARDS) != AFTERWARDS:
        yield
        return
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[PARALLELISM] = AFTERWARDS
