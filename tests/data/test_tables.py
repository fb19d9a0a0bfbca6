"""Do parquet and Arrow files give the texts that are in them, and is each bad one refused in one line?"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concertina.config import DataConfig
from concertina.data.sources import find_files, read_pieces, text_bytes
from concertina.data.tables import BATCH_ROWS, TableKind, column_bytes, read_column, saved_files
from concertina.errors import DataError

pytestmark = pytest.mark.unit

TEXTS = ["one\ntwo", None, "", "früh", *(f"row {number}" for number in range(2 * BATCH_ROWS))]
TABLE = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS, "words": pa.array(TEXTS).dictionary_encode()})


def save_to_disk(folder: Path, *tables: pa.Table) -> Path:
    """The folder that `datasets` 5.2 writes, as far as it matters: a stream a file, and `state.json`."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as raw, pa.ipc.new_stream(raw, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def write_table(folder: Path, kind: str, table: pa.Table = TABLE) -> Path:
    path = folder / f"t.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=1500)
    else:
        writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as raw, writer(raw, table.schema) as out:
            out.write_table(table, max_chunksize=1000)
    return path


def kind_of(path: Path) -> TableKind:
    return "parquet" if path.suffix == ".parquet" else "arrow"


def refusal(path: Path, column: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        list(read_column(path, kind_of(path), column))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("column", ["text", "words"])
def test_every_row_with_a_text_in_order(kind: str, column: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, kind)
    assert list(read_column(path, kind_of(path), column)) == [text for text in TEXTS if text]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_how_much_text_there_is_is_about_known_before(kind: str, tmp_path: Path) -> None:
    """To within the lengths and encodings that stand beside it: samples are spread by it."""
    table = pa.table({"text": [f"{number} {'x' * 200}" for number in range(3000)], "id": list(range(3000))})
    path = write_table(tmp_path, kind, table)
    true = sum(len(text) for text in table["text"].to_pylist())
    assert column_bytes(path, kind_of(path), "text") == pytest.approx(true, rel=0.05)


def test_a_saved_dataset_is_read_file_by_file(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TABLE.slice(0, 5), TABLE.slice(5, 7))
    data = DataConfig(source=str(folder))
    files = find_files(data)
    assert [file.path for file in files] == saved_files(folder)
    assert [piece.text for piece in read_pieces(files, data)] == [text for text in TEXTS[:12] if text]
    assert all(piece.starts_document and piece.ends_document for piece in read_pieces(files, data))
    assert text_bytes(files, data) < 1000
    assert text_bytes(files, data.model_copy(update={"max_bytes": 7})) == 7


def test_tables_are_taken_from_folders_by_their_ending(tmp_path: Path) -> None:
    path = write_table(tmp_path, "parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    found = find_files(DataConfig(source=str(tmp_path)))
    assert [(file.path.name, file.kind) for file in found] == [("a.jsonl", "jsonl"), (path.name, "parquet")]
    assert len(find_files(DataConfig(source=str(tmp_path), format="parquet"))) == 1


def test_splits_are_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "all" / "train", TABLE)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=f"the splits train, test of a dataset: name one of them, as {tmp_path}/all/tr"):
        find_files(DataConfig(source=str(tmp_path / "all")))
    assert len(find_files(DataConfig(source=str(tmp_path / "all" / "train")))) == 1


def test_a_dataset_that_is_not_whole(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TABLE, TABLE)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="1 of 2 files of the dataset are missing, first data-00001-of-00002"):
        saved_files(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json names no files"):
        saved_files(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: not JSON"):
        saved_files(folder)
    assert saved_files(tmp_path) is None


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_bad_tables(kind: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, kind)
    assert "no column 'body' (the table has id, text, words); set data.text_field" in refusal(path, "body")
    assert "column 'id' is int64, not text (texts are in text); set data.text_field" in refusal(path, "id")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"({len(whole) // 2} bytes) does not read as {kind_of(path)}" in refusal(path)
    path.write_bytes(b"plain words")
    assert f"(11 bytes) does not read as {kind_of(path)}" in refusal(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    binary = pa.array([b"fine", b"\xff\xfe"], type=pa.binary())
    path = write_table(tmp_path, "parquet", pa.table({"text": binary.view(pa.string())}))
    assert "not UTF-8" in refusal(path)
