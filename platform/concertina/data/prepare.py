"""How do a job's files become a token corpus, or the corpora of a mixture, exactly once?

The folder is named by a fingerprint of what goes in (paths, sizes, modification times, settings), built beside its
final place and renamed into it: it is whole or absent, and of several preparers at once the first to rename wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
from tokenizers import Tokenizer

from concertina.config import DataConfig
from concertina.data.corpus import MANIFEST, TOKENIZER, FileFacts, Manifest, TokenCorpus, sha256_of
from concertina.data.lexicon import Lexicon
from concertina.data.mixture import MIXTURE, MixtureManifest
from concertina.data.sources import (
    STDLIB,
    TOKEN_KINDS,
    Piece,
    SourceFile,
    find_files,
    open_tokens,
    read_pieces,
    text_bytes,
)
from concertina.data.token_files import TokenFile
from concertina.data.tokenizer import all_cores, end_of_text_id
from concertina.data.writer import TokenWriter
from concertina.errors import DataError

__all__ = ["Progress", "corpus_folder", "fingerprint", "prepare"]

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]
BATCH_BYTES = 4_000_000
BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class _Recipe:
    """One corpus to be: what goes in, and what cuts it."""

    files: list[SourceFile]
    data: DataConfig
    lexicon: Lexicon

    @property
    def is_tokens(self) -> bool:
        return self.files[0].kind in TOKEN_KINDS


def prepare(data: DataConfig, storage: Path | str, vocab_size: int, progress: Progress | None = None) -> Path:
    """The folder `<storage>/data/<fingerprint>` of the corpus, built if it is not there yet; of a mixture the one that
    names its corpora, each built if need be.

    `vocab_size` is the model's: DataError when a token id is not below it, or for anything wrong with the input.
    """
    heard = progress or (lambda what, done, total: None)
    if data.sources is None:
        return _prepare_one(_recipe(data), storage, vocab_size, heard)
    recipes = _recipes(data)
    for recipe in recipes.values():
        _take_known_tokenizer(recipe, storage)
    corpora = []
    for name, recipe in recipes.items():
        with _about(name):
            corpora.append(_prepare_one(recipe, storage, vocab_size, heard))
    mixture = _mixture(data, recipes)
    folder = _data_folder(storage) / mixture.fingerprint
    if not folder.exists():
        with _into_place(folder) as building:
            if of_all := [corpus / TOKENIZER for corpus in corpora if (corpus / TOKENIZER).is_file()]:
                shutil.copyfile(of_all[0], building / TOKENIZER)
            (building / MIXTURE).write_text(mixture.model_dump_json(indent=2) + "\n")
    return folder


def corpus_folder(data: DataConfig, storage: Path | str) -> Path:
    """Where `prepare` puts, or has put, the corpus."""
    if data.sources is None:
        return _folder(_recipe(data), storage)
    return _data_folder(storage) / _mixture(data, _recipes(data)).fingerprint


def fingerprint(files: list[SourceFile], data: DataConfig, lexicon: Lexicon | None = None) -> str:
    """32 hexadecimal characters; equal for equal sources and settings, without reading any text."""
    lexicon = lexicon or Lexicon(data.tokenizer, [(files, data)])
    has_fields = any(file.kind in ("jsonl", "parquet", "arrow") for file in files)
    is_text = files[0].kind not in TOKEN_KINDS
    facts = {
        "format_version": 1,
        "files": [[file.name, file.kind, file.num_bytes, file.mtime_ns] for file in files],
        "python": platform.python_version() if any(file.mtime_ns is None for file in files) else None,
        "max_bytes": data.max_bytes,
        "text_field": data.text_field if has_fields else None,
        "document_token": data.document_token if files[0].kind == "nanogpt" else None,
        "tokenizer": lexicon.identity if data.tokenizer.path or is_text else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _recipe(data: DataConfig) -> _Recipe:
    files = find_files(data)
    return _Recipe(files, data, Lexicon(data.tokenizer, [(files, data)]))


def _recipes(data: DataConfig) -> dict[str, _Recipe]:
    """Of each source, in order of their names; one tokenizer for all."""
    files: dict[str, list[SourceFile]] = {}
    for name, part in data.parts.items():
        with _about(name):
            files[name] = find_files(part)
    texts = [name for name, found in files.items() if found[0].kind not in TOKEN_KINDS]
    if texts and len(texts) < len(files) and data.tokenizer.path is None:
        tokens = next(name for name in files if name not in texts)
        raise DataError(
            f"data.sources mixes tokens ({tokens}) with text ({texts[0]}), which a tokenizer of its own would cut: "
            "set data.tokenizer.path to the one that the tokens were made with"
        )
    lexicon = Lexicon(data.tokenizer, [(files[name], data.parts[name]) for name in texts])
    return {name: _Recipe(found, data.parts[name], lexicon) for name, found in files.items()}


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Which source of a mixture an error is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"source {name}: {error.message}", **error.data) from error


def _mixture(data: DataConfig, recipes: dict[str, _Recipe]) -> MixtureManifest:
    assert data.sources is not None
    weights = {name: data.sources[name].weight for name in recipes}
    return MixtureManifest.of(
        {name: (weights[name], fingerprint(r.files, r.data, r.lexicon)) for name, r in recipes.items()}
    )


def _take_known_tokenizer(recipe: _Recipe, storage: Path | str) -> None:
    """One trained for the same texts need not be trained again for one that is missing."""
    known = _folder(recipe, storage) / TOKENIZER
    if not recipe.is_tokens and recipe.lexicon.path is None and known.is_file():
        recipe.lexicon.take(known)


def _data_folder(storage: Path | str) -> Path:
    return Path(storage).expanduser().absolute() / "data"


def _folder(recipe: _Recipe, storage: Path | str) -> Path:
    return _data_folder(storage) / fingerprint(recipe.files, recipe.data, recipe.lexicon)


def _prepare_one(recipe: _Recipe, storage: Path | str, vocab_size: int, progress: Progress) -> Path:
    folder = _folder(recipe, storage)
    if not folder.exists():
        _check_tokenizer(recipe, vocab_size)
        _build(recipe, folder, progress)
    TokenCorpus.open(folder).check_vocabulary(vocab_size)
    return folder


def _check_tokenizer(recipe: _Recipe, vocab_size: int) -> None:
    """Refuse, before the work, a vocabulary that the model cannot embed."""
    if recipe.is_tokens and recipe.lexicon.path is None:
        return
    wanted, key = recipe.lexicon.size
    if wanted > vocab_size:
        raise DataError(
            f"the tokenizer ({key}) has {wanted} tokens, more than model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {wanted} or more",
            tokenizer_size=wanted,
            vocab_size=vocab_size,
        )


def _build(recipe: _Recipe, folder: Path, progress: Progress) -> None:
    with _into_place(folder) as building:
        if recipe.is_tokens:
            _take_tokens(recipe, building, folder.name, progress)
        else:
            with all_cores():
                _tokenize(recipe, building, folder.name, progress)


@contextmanager
def _into_place(folder: Path) -> Iterator[Path]:
    """A folder that becomes `folder` when it is whole, unless another preparer was first: that has the same in it."""
    with _sibling(folder) as building:
        yield building
        try:
            building.rename(folder)
        except OSError:
            if not any((folder / name).is_file() for name in (MANIFEST, MIXTURE)):
                raise


@contextmanager
def _sibling(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, gone afterwards; those of dead preparers on this machine go too."""
    here = socket.gethostname()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = folder.parent / f".{folder.name}.{here}.{os.getpid()}.{uuid4().hex[:8]}"
        building.mkdir()
    except OSError as error:
        raise DataError(
            f"cannot write to {folder.parent}: {error.strerror}; set storage_path to a folder you may write to",
            path=str(folder.parent),
        ) from error
    for left_over in folder.parent.glob(f".*.{here}.*.*"):
        pid = left_over.name.rsplit(".", 2)[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left_over, ignore_errors=True)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _tokenize(recipe: _Recipe, building: Path, name: str, progress: Progress) -> None:
    files, data = recipe.files, recipe.data
    tokenizer = recipe.lexicon.tokenizer(lambda total: progress("training the tokenizer", 0, total))
    tokenizer.save(str(building / TOKENIZER))
    # "<|endoftext|>" inside a document is text, not a boundary.
    tokenizer.encode_special_tokens = True
    end = end_of_text_id(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    total = text_bytes(files, data)
    done = 0
    with TokenWriter(building, "uint16" if vocab_size <= 1 << 16 else "uint32") as writer:
        for batch in _batches(read_pieces(files, data)):
            _encode(tokenizer, batch, end, writer)
            done += sum(piece.num_bytes for piece in batch)
            progress("tokenizing", done, total)
    facts = {"vocab_size": vocab_size, "text_bytes": done, "end_of_text": end}
    _write_manifest(building, name, writer, files, data, **facts)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces by the batch, so that every core has some and memory stays bounded."""
    batch, num_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        num_bytes += piece.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[Piece], end: int | None, writer: TokenWriter) -> None:
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        if piece.starts_document:
            writer.start_document()
        writer.add(np.array(encoding.ids, dtype=np.int64))
        if piece.ends_document and end is not None:
            writer.add(np.array([end]))


def _take_tokens(recipe: _Recipe, building: Path, name: str, progress: Progress) -> None:
    """Tokens as they are. One file stays where it is and is read once, to know what is in it; several, or the beginning
    of one, are copied into one."""
    data = recipe.data
    if recipe.lexicon.path is not None:
        recipe.lexicon.given().save(str(building / TOKENIZER))
    opened = [found for found in map(open_tokens, recipe.files) if len(found.tokens)]
    in_place = opened[0] if len(opened) == 1 and data.max_bytes is None else None
    dtype: Any = "uint32" if any(found.tokens.dtype.itemsize > 2 for found in opened) else "uint16"
    if in_place is not None:
        dtype = in_place.tokens.dtype.name
    num_bytes = sum(found.tokens.nbytes for found in opened)
    total = left = min(num_bytes, data.max_bytes or num_bytes)
    what, done = ("reading tokens" if in_place else "copying tokens"), 0
    with TokenWriter(building, dtype, in_place.path if in_place else None) as writer:
        for found in opened:
            tokens = found.tokens[: left // found.tokens.dtype.itemsize]
            for block in _add_blocks(writer, found, tokens, data.document_token):
                done += block
                progress(what, done, total)
            left -= tokens.nbytes
    ends = data.document_token if recipe.files[0].kind == "nanogpt" else None
    facts = {"vocab_size": writer.largest + 1, "text_bytes": None, "end_of_text": ends}
    _write_manifest(building, name, writer, recipe.files, data, **facts)


def _add_blocks(writer: TokenWriter, found: TokenFile, tokens: Any, document_token: int | None) -> Iterator[int]:
    """Hand tokens over by the block; sizes of the blocks in bytes. Where the file does not say where documents start,
    one starts with it and after each `document_token`."""
    if found.starts is None:
        writer.start_document()
    for first in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[first : first + BLOCK_TOKENS]
        if found.starts is None:
            writer.add(block, document_token=document_token)
        else:
            bounds = np.searchsorted(found.starts, [first, first + len(block)])
            writer.add(block, document_starts=found.starts[bounds[0] : bounds[1]] - first)
        yield block.nbytes


def _write_manifest(
    building: Path, name: str, writer: TokenWriter, files: list[SourceFile], data: DataConfig, **facts: int | None
) -> None:
    named = [data.source] if isinstance(data.source, str) else list(data.source)
    tokenizer = building / TOKENIZER
    if tokenizer.exists():
        status = tokenizer.stat()
        writer.files[TOKENIZER] = FileFacts(
            num_bytes=status.st_size, sha256=sha256_of(tokenizer), mtime_ns=status.st_mtime_ns
        )
    manifest = Manifest.model_validate(
        {
            "fingerprint": name,
            "dtype": writer.dtype,
            "tokens": writer.tokens_name,
            "num_tokens": writer.num_tokens,
            "num_documents": writer.num_documents,
            "largest_token": writer.largest,
            "sources": {
                "source": named,
                "num_files": len(files),
                "num_bytes": sum(file.num_bytes for file in files),
                "max_bytes": data.max_bytes,
                "python": platform.python_version() if STDLIB in named else None,
            },
            "files": writer.files,
            **facts,
        }
    )
    (building / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
