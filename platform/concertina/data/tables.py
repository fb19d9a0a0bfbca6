"""Which texts are in a table? Parquet files, and Arrow files as Hugging Face's `datasets` saves them.

`pyarrow` alone reads both: a dataset that was saved with `save_to_disk` is Arrow record batches and two pages of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from concertina.errors import DataError

__all__ = ["TableKind", "column_bytes", "read_column", "saved_files"]

TableKind = Literal["parquet", "arrow"]
BATCH_ROWS = 1024
STATE, SPLITS = "state.json", "dataset_dict.json"


def read_column(path: Path, kind: TableKind, column: str) -> Iterator[str]:
    """The text of every row that has one, in order; memory stays near that of a batch of rows.

    Raises DataError for a file that is damaged, has no such column, or holds no text in it.
    """
    with _refused(path, kind):
        for values in _batches(path, kind, column):
            yield from (text for text in values.to_pylist() if text)


def column_bytes(path: Path, kind: TableKind, column: str) -> int:
    """About how many bytes of text a column holds, without reading it."""
    with _refused(path, kind):
        if kind == "arrow":
            return sum(int(values.nbytes) for values in _batches(path, kind, column))
        table = _open_parquet(path, column)
        groups = (table.metadata.row_group(index) for index in range(table.metadata.num_row_groups))
        columns = (group.column(index) for group in groups for index in range(group.num_columns))
        return sum(int(chunk.total_uncompressed_size) for chunk in columns if chunk.path_in_schema == column)


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a dataset that `save_to_disk` has written into `folder`, in order; None when it is no such
    folder. Raises DataError for one of several splits, or when files are missing."""
    if (folder / SPLITS).is_file():
        splits = _read_json(folder / SPLITS).get("splits") or ["?"]
        raise DataError(
            f"{folder} holds the splits {', '.join(splits)} of a dataset: name one of them, as {folder / splits[0]}",
            path=str(folder),
        )
    if not (folder / STATE).is_file():
        return None
    named = _read_json(folder / STATE).get("_data_files")
    if not isinstance(named, list) or not named:
        raise DataError(f"{folder / STATE} names no files: save the dataset again with save_to_disk", path=str(folder))
    files = [folder / str(entry["filename"]) for entry in named]
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} files of the dataset are missing, first {missing[0]}: "
            "copy the folder again",
            path=str(folder),
        )
    return files


def _batches(path: Path, kind: TableKind, column: str) -> Iterator[Any]:
    """The column, some rows at a time."""
    if kind == "parquet":
        for batch in _open_parquet(path, column).iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            yield batch.column(0)
        return
    import pyarrow as pa

    with pa.memory_map(str(path)) as raw:
        # `datasets` writes streams; the file format begins with a word of its own.
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
        _check_column(path, reader.schema, column)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            yield batch.column(column)


def _open_parquet(path: Path, column: str) -> Any:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path, memory_map=True)
    _check_column(path, table.schema_arrow, column)
    return table


def _check_column(path: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        names = ", ".join(schema.names)
        raise DataError(f"{path}: no column '{column}' (the table has {names}); set data.text_field", path=str(path))
    kind = schema.field(column).type
    held = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(held) or types.is_large_string(held) or types.is_string_view(held)):
        texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        hint = f"texts are in {', '.join(texts)}" if texts else "no column of it holds text"
        raise DataError(f"{path}: column '{column}' is {kind}, not text ({hint}); set data.text_field", path=str(path))


@contextmanager
def _refused(path: Path, kind: TableKind) -> Iterator[None]:
    """What pyarrow cannot read becomes one line."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path}: a table needs pyarrow: pip install 'concertina[data]'", path=str(path)) from None
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: holds bytes that are not UTF-8 ({error.reason}): write it again") from error
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) does not read as {kind}: {said}; copy or write it again",
            path=str(path),
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({str(error).splitlines()[0]}): save the dataset again") from error
    return found if isinstance(found, dict) else {}
