"""Where does the text come from? Finds the files a job names and reads them piece by piece.

A piece is at most about PIECE_BYTES of text: large documents are cut where a tokenizer would cut as well (after a line
end between two visible characters), so that memory stays bounded and all cores tokenize.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from concertina.config import DataConfig
from concertina.data.hub import PREFIX, dataset_files
from concertina.data.tables import TableKind, column_bytes, read_column, saved_files
from concertina.data.token_files import TokenFile, megatron_pair, open_megatron, open_nanogpt
from concertina.errors import DataError

__all__ = [
    "STDLIB",
    "TOKEN_KINDS",
    "Piece",
    "SourceFile",
    "find_files",
    "open_tokens",
    "read_pieces",
    "standard_library",
    "text_bytes",
]

STDLIB = "stdlib"
PIECE_BYTES = 256 * 1024
# Not prose a model should learn from: tests, vendored packages, generated tables (`encodings` is character maps), and
# what differs between two installations of the same Python.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "encodings", "lib2to3"}
)
STDLIB_SKIPPED_FILES = ("_sysconfigdata*", "_sysconfig_vars*", "sitecustomize.py", "usercustomize.py")
LINE_END = re.compile(rb"\S\n(?=\S)")

Kind = Literal["text", "jsonl", "parquet", "arrow", "nanogpt", "megatron"]
BY_ENDING: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "nanogpt",
    ".idx": "megatron",
}
TOKEN_KINDS = frozenset({"nanogpt", "megatron"})
"""Those that hold tokens and no text."""


@dataclass(frozen=True)
class SourceFile:
    """One input file. `name` is what identifies it: its path, or for the standard library its path inside. Of a pair of
    Megatron's it is the `.bin`; bytes and modification time are those of both."""

    path: Path
    name: str
    kind: Kind
    num_bytes: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Piece:
    """Text of one document, or a part of it; `num_bytes` is its size in UTF-8."""

    text: str
    num_bytes: int
    starts_document: bool
    ends_document: bool


def find_files(data: DataConfig) -> list[SourceFile]:
    """The files `data.source` names, in a fixed order: as named, folders in alphabetical order of their paths.

    Raises DataError for a missing file, a folder without a match, text mixed with token files, or an empty corpus.
    """
    named = (data.source,) if isinstance(data.source, str) else data.source
    files = [file for source in named for file in _files_of(source, data)]
    tokens = [file for file in files if file.kind in TOKEN_KINDS]
    texts = [file for file in files if file.kind not in TOKEN_KINDS]
    if tokens and texts:
        raise DataError(
            f"data.source mixes token files ({tokens[-1].path}) with text ({texts[-1].path}): "
            f"name only one of the two kinds, or make them two of data.sources",
        )
    if not sum(file.num_bytes for file in files):
        raise DataError(
            f"the corpus is empty: {len(files)} file(s) of data.source={', '.join(named)} hold 0 bytes; "
            f"name files that hold text",
        )
    return files


def read_pieces(files: list[SourceFile], data: DataConfig) -> Iterator[Piece]:
    """The text of all documents in order, `data.max_bytes` of it at most; documents without text are left out."""
    left = sys.maxsize if data.max_bytes is None else data.max_bytes
    for file in files:
        for piece in _pieces_of(file, data):
            if piece.num_bytes >= left:
                if text := piece.text.encode()[:left].decode(errors="ignore"):
                    yield Piece(text, len(text.encode()), piece.starts_document, ends_document=True)
                return
            left -= piece.num_bytes
            yield piece


def text_bytes(files: list[SourceFile], data: DataConfig) -> int:
    """About how much text `read_pieces` gives, without reading it."""
    total = sum(
        column_bytes(file.path, file.kind, data.text_field) if file.kind in ("parquet", "arrow") else file.num_bytes
        for file in files
    )
    return min(total, data.max_bytes or total)


def open_tokens(file: SourceFile) -> TokenFile:
    """Of a file that holds tokens."""
    return open_megatron(file.path) if file.kind == "megatron" else open_nanogpt(file.path)


def _pieces_of(file: SourceFile, data: DataConfig) -> Iterator[Piece]:
    if file.kind == "jsonl":
        return _json_lines(file.path, data)
    if file.kind in ("parquet", "arrow"):
        return _rows(file.path, file.kind, data)
    return _text(file.path)


def _files_of(source: str, data: DataConfig) -> list[SourceFile]:
    if source == STDLIB:
        return standard_library(Path(sysconfig.get_path("stdlib")))
    if source.startswith(PREFIX):
        return [_source_file(path, "arrow") for path in dataset_files(source)]
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        saved = saved_files(path) if data.format in ("auto", "arrow") else None
        if saved is not None:
            return [_source_file(file, "arrow") for file in saved]
        found = [_source_file(match, _kind(match, data)) for match in _matches(path, source, data)]
        return list(dict.fromkeys(found))  # both files of a pair may match
    if not path.is_file():
        if data.format in ("auto", "megatron") and (pair := megatron_pair(path)) is not None:
            return [_source_file(pair[0], "megatron")]
        parent = next(p for p in path.parents if p.is_dir())
        reason = "" if parent == path.parent else f" ({parent} is the part of the path that exists)"
        raise DataError(f"data.source: no file or folder {path}{reason}; correct the path", path=str(path))
    return [_source_file(path, _kind(path, data))]


def _kind(path: Path, data: DataConfig) -> Kind:
    if data.format != "auto":
        return data.format
    pair = megatron_pair(path) if path.suffix in (".bin", ".idx") else None
    return "megatron" if pair is not None else BY_ENDING.get(path.suffix, "text")


def _source_file(path: Path, kind: Kind) -> SourceFile:
    if kind != "megatron":
        if kind == "nanogpt":
            open_nanogpt(path)
        status = path.stat()
        return SourceFile(path, str(path), kind, status.st_size, status.st_mtime_ns)
    pair = megatron_pair(path)
    if pair is None:
        raise DataError(
            f"{path}: a token file of Megatron's is a pair, {path.stem}.bin and {path.stem}.idx: copy both, "
            "or set data.format",
            path=str(path),
        )
    found = [file.stat() for file in pair]
    num_bytes, newest = sum(status.st_size for status in found), max(status.st_mtime_ns for status in found)
    return SourceFile(pair[0], str(pair[0]), kind, num_bytes, newest)


def _matches(folder: Path, source: str, data: DataConfig) -> list[Path]:
    patterns = data.include
    ending = next((ending for ending, kind in BY_ENDING.items() if kind == data.format), ".jsonl")
    if ending != ".jsonl":
        patterns = tuple(p for p in patterns if p.endswith(ending)) or (f"*{ending}",)
    present = [path for path in _walk(folder) if path.is_file()]
    found = [path for path in present if any(fnmatch(path.name, p) for p in patterns)]
    if not found:
        example = f", for example {present[0].relative_to(folder)}" if present else ""
        raise DataError(
            f"data.source: none of the {len(present)} files in {source}{example} matches "
            f"{', '.join(patterns)}; name other patterns in data.include",
            folder=str(folder),
            num_files=len(present),
        )
    return found


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files under `folder` in a fixed order; hidden and cache folders are left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skipped and f != "__pycache__" and f[0] != ".")
        yield from (Path(parent, name) for name in sorted(names))


def standard_library(root: Path) -> list[SourceFile]:
    """The .py files of a Python's standard library. No modification times and no folder in what identifies them:
    every installation of one version gives the same corpus."""
    found = []
    for path in _walk(root, STDLIB_SKIPPED_FOLDERS):
        if path.suffix == ".py" and not any(fnmatch(path.name, p) for p in STDLIB_SKIPPED_FILES):
            found.append(SourceFile(path, path.relative_to(root).as_posix(), "text", path.stat().st_size, None))
    if not found:
        raise DataError(
            f"data.source: no standard library source (.py files) in {root}: this Python ships without it; "
            f"name files or folders of text in data.source",
        )
    return found


def _text(path: Path) -> Iterator[Piece]:
    """One document, the whole file."""
    rest, offset, first = b"", 0, True
    with path.open("rb") as file:
        last = False
        while not last:
            block = file.read(PIECE_BYTES)
            last = len(block) < PIECE_BYTES
            rest += block
            at = len(rest) if last else _place_to_cut(rest)
            text = _decode(rest[:at], path, offset)
            if at or not first:
                yield Piece(text, at, first, last)
            rest, offset, first = rest[at:], offset + at, False


def _place_to_cut(raw: bytes) -> int:
    """Length of the piece to take: up to a line end between two visible characters, else any line end, else the
    beginning of the last character (UTF-8 continuation bytes are 10xxxxxx)."""
    tail = max(0, len(raw) - PIECE_BYTES // 4)
    ends = [match.end() for match in LINE_END.finditer(raw, tail)]
    if ends:
        return ends[-1]
    if newline := raw.rfind(b"\n", tail) + 1:
        return newline
    at = len(raw) - 1
    while at > len(raw) - 4 and raw[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{path}: byte {at} (0x{raw[error.start]:02x}) is not UTF-8 text; convert the file "
            f"(iconv -t utf-8), leave it out with data.include, or set data.format if it holds tokens",
            path=str(path),
            offset_bytes=at,
        ) from error


def _json_lines(path: Path, data: DataConfig) -> Iterator[Piece]:
    """One document a line; empty lines and empty texts are left out."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                text = _text_of_line(line, f"{path}:{number}", data.text_field)
                if text:
                    yield Piece(text, _num_bytes(text, f"{path}:{number}"), True, True)


def _rows(path: Path, kind: TableKind, data: DataConfig) -> Iterator[Piece]:
    """One document a row."""
    for text in read_column(path, kind, data.text_field):
        yield Piece(text, len(text.encode()), True, True)


def _text_of_line(line: str, where: str, field: str) -> str:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON at column {error.colno} ({error.msg}); mend or remove it") from error
    if not isinstance(record, dict) or field not in record:
        has = f"has {', '.join(map(str, record))}" if isinstance(record, dict) else "is no object"
        raise DataError(f"{where}: no field '{field}' (the line {has}); set data.text_field")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise DataError(f"{where}: field '{field}' is {kind}, not text; set data.text_field or mend the line")
    return record[field]


def _num_bytes(text: str, where: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}; mend or remove it") from error
