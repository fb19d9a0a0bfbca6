"""How do a job's text files become a token corpus, exactly once?

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
from pathlib import Path
from uuid import uuid4

import numpy as np
import psutil
import tokenizers
from tokenizers import Tokenizer

from concertina.config.schema import DataConfig
from concertina.data.corpus import MANIFEST, TOKENIZER, FileFacts, Manifest, TokenCorpus, sha256_of
from concertina.data.sources import STDLIB, Piece, SourceFile, find_files, read_pieces
from concertina.data.tokenizer import all_cores, end_of_text_id, load_tokenizer, sample, train_tokenizer
from concertina.data.writer import TokenWriter
from concertina.errors import DataError

__all__ = ["Progress", "corpus_folder", "fingerprint", "prepare"]

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]
BATCH_BYTES = 4_000_000
BLOCK_TOKENS = 1 << 22


def prepare(data: DataConfig, storage: Path | str, vocab_size: int, progress: Progress | None = None) -> Path:
    """The folder `<storage>/data/<fingerprint>` of the corpus, built if it is not there yet.

    `vocab_size` is the model's: DataError when a token id is not below it, or for anything wrong with the input.
    """
    files = find_files(data)
    folder = _folder(files, data, storage)
    if not folder.exists():
        _check_tokenizer(data, files, vocab_size)
        _build(files, data, folder, progress or (lambda what, done, total: None))
    TokenCorpus.open(folder).check_vocabulary(vocab_size)
    return folder


def corpus_folder(data: DataConfig, storage: Path | str) -> Path:
    """Where `prepare` puts, or has put, the corpus."""
    return _folder(find_files(data), data, storage)


def _folder(files: list[SourceFile], data: DataConfig, storage: Path | str) -> Path:
    return Path(storage).expanduser().absolute() / "data" / fingerprint(files, data)


def fingerprint(files: list[SourceFile], data: DataConfig) -> str:
    """32 hexadecimal characters; equal for equal sources and settings, without reading any text."""
    # A trained vocabulary may differ between versions of the library.
    tokenizer: list[str | int] = [data.tokenizer.vocab_size, tokenizers.__version__]
    if data.tokenizer.path is not None:
        path = _tokenizer_path(data.tokenizer.path)
        tokenizer = [str(path), path.stat().st_size, path.stat().st_mtime_ns]
    facts = {
        "format_version": 1,
        "files": [[file.name, file.kind, file.num_bytes, file.mtime_ns] for file in files],
        "python": platform.python_version() if any(file.mtime_ns is None for file in files) else None,
        "max_bytes": data.max_bytes,
        "text_field": data.text_field if any(file.kind == "jsonl" for file in files) else None,
        "document_token": data.document_token if files[0].kind == "nanogpt" else None,
        "tokenizer": tokenizer if data.tokenizer.path or files[0].kind != "nanogpt" else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_path(path: str) -> Path:
    found = Path(path).expanduser().absolute()
    if not found.is_file():
        raise DataError(f"data.tokenizer.path: no file {found}; correct the path", path=str(found))
    return found


def _check_tokenizer(data: DataConfig, files: list[SourceFile], vocab_size: int) -> None:
    """Refuse, before the work, a vocabulary that the model cannot embed."""
    wanted, key = data.tokenizer.vocab_size, "data.tokenizer.vocab_size"
    if data.tokenizer.path is not None:
        wanted, key = load_tokenizer(_tokenizer_path(data.tokenizer.path)).get_vocab_size(), data.tokenizer.path
    elif files[0].kind == "nanogpt":
        return
    if wanted > vocab_size:
        raise DataError(
            f"the tokenizer ({key}) has {wanted} tokens, more than model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {wanted} or more",
            tokenizer_size=wanted,
            vocab_size=vocab_size,
        )


def _build(files: list[SourceFile], data: DataConfig, folder: Path, progress: Progress) -> None:
    with _sibling(folder) as building:
        if files[0].kind == "nanogpt":
            _copy_tokens(files, data, building, folder.name, progress)
        else:
            with all_cores():
                _tokenize(files, data, building, folder.name, progress)
        try:
            building.rename(folder)
        except OSError:
            # Another preparer was first: its folder holds the same tokens.
            if not (folder / MANIFEST).is_file():
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


def _tokenize(files: list[SourceFile], data: DataConfig, building: Path, name: str, progress: Progress) -> None:
    total = sum(file.num_bytes for file in files)
    total = min(total, data.max_bytes or total)
    if data.tokenizer.path is not None:
        tokenizer = load_tokenizer(_tokenizer_path(data.tokenizer.path))
    else:
        progress("training the tokenizer", 0, total)
        tokenizer = train_tokenizer(sample(read_pieces(files, data), total), data.tokenizer.vocab_size)
    tokenizer.save(str(building / TOKENIZER))
    # "<|endoftext|>" inside a document is text, not a boundary.
    tokenizer.encode_special_tokens = True
    end = end_of_text_id(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
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


def _copy_tokens(files: list[SourceFile], data: DataConfig, building: Path, name: str, progress: Progress) -> None:
    """nanoGPT files: the tokens as they are. A document starts with each file and after each `document_token`."""
    if data.tokenizer.path is not None:
        load_tokenizer(_tokenizer_path(data.tokenizer.path)).save(str(building / TOKENIZER))
    total = min(sum(file.num_bytes for file in files), data.max_bytes or (1 << 62)) // 2
    left = total
    with TokenWriter(building, "uint16") as writer:
        for file in files:
            if not left or not file.num_bytes:
                continue
            tokens = np.memmap(file.path, dtype="<u2", mode="r")[:left]
            writer.start_document()
            for first in range(0, len(tokens), BLOCK_TOKENS):
                writer.add(tokens[first : first + BLOCK_TOKENS], document_token=data.document_token)
                progress("copying tokens", 2 * writer.num_tokens, 2 * total)
            left -= len(tokens)
    facts = {"vocab_size": writer.largest + 1, "text_bytes": None, "end_of_text": data.document_token}
    _write_manifest(building, name, writer, files, data, **facts)


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
