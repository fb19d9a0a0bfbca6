"""Are all kinds of input read as they are, and is each bad one refused in one line with numbers and a remedy?"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.config.schema import DataConfig
from concertina.data import sources
from concertina.data.sources import PIECE_BYTES, find_files, read_pieces
from concertina.errors import DataError
from tests.data.test_token_files import write_pair

pytestmark = pytest.mark.unit


def documents_of(data: DataConfig) -> list[str]:
    """The documents, put together again from their pieces."""
    documents: list[str] = []
    ended = True
    for piece in read_pieces(find_files(data), data):
        assert piece.starts_document == ended
        assert piece.num_bytes == len(piece.text.encode())
        documents = [*documents, piece.text] if piece.starts_document else [*documents[:-1], documents[-1] + piece.text]
        ended = piece.ends_document
    assert ended
    return documents


def refusal(data: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        documents_of(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_read_in_order_of_paths_by_pattern(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.rst", ".hidden/e.txt", "__pycache__/f.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert documents_of(DataConfig(source=str(tmp_path))) == ["a.md", "b.txt", "sub/c.py"]
    assert documents_of(DataConfig(source=str(tmp_path), include=("*.rst",))) == ["sub/d.rst"]


def test_files_are_read_as_named_and_empty_ones_left_out(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("z.txt", "empty.txt", "a.log")]
    for path, text in zip(paths, ("last\r\n", "", "früh"), strict=True):
        path.write_bytes(text.encode())
    assert documents_of(DataConfig(source=tuple(map(str, paths)))) == ["last\r\n", "früh"]


def test_json_lines_are_one_document_each(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": ""}\n{"text": "three"}')
    assert documents_of(DataConfig(source=str(path))) == ["one\ntwo", "three"]


def test_large_files_come_in_pieces_that_end_where_lines_end(tmp_path: Path) -> None:
    text = "".join(f"line {i} ä\n\n" if i % 3 else f"line {i}\n" for i in range(60_000))
    path = tmp_path / "large.txt"
    path.write_text(text)
    data = DataConfig(source=str(path))
    pieces = list(read_pieces(find_files(data), data))
    assert len(pieces) > 2
    assert all(piece.text.endswith("\n") and not piece.text.endswith("\n\n") for piece in pieces[:-1])
    assert documents_of(data) == [text]


@given(filler=st.sampled_from(["ä", "\U0001f3b5", "x", " ", "\n"]), extra=st.integers(-3, 3))
@settings(max_examples=15, deadline=None)
def test_a_file_without_a_place_to_cut_is_cut_between_characters(
    tmp_path_factory: pytest.TempPathFactory, filler: str, extra: int
) -> None:
    text = "y" * (extra + 4) + filler * (2 * PIECE_BYTES // len(filler.encode()) + extra)
    path = tmp_path_factory.mktemp("cut") / "one.txt"
    path.write_bytes(text.encode())
    assert documents_of(DataConfig(source=str(path))) == [text]


def test_max_bytes_ends_the_text_inside_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("dääää")
    (tmp_path / "c.txt").write_text("never")
    assert documents_of(DataConfig(source=str(tmp_path), max_bytes=7)) == ["abc", "dä"]
    assert documents_of(DataConfig(source=str(tmp_path), max_bytes=3)) == ["abc"]


def test_the_standard_library_is_real_source_without_tests() -> None:
    files = find_files(DataConfig())
    names = [file.name for file in files]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib", "encodings"} & set(n.split("/"))]
    assert names == [file.name for file in find_files(DataConfig())]
    assert all(file.mtime_ns is None for file in files)
    assert sum(file.num_bytes for file in files) > 5_000_000
    assert sum(piece.num_bytes for piece in read_pieces(files, DataConfig())) == sum(f.num_bytes for f in files)


def test_missing_path(tmp_path: Path) -> None:
    message = refusal(DataConfig(source=str(tmp_path / "no" / "such.txt")))
    assert f"no file or folder {tmp_path}/no/such.txt" in message
    assert f"{tmp_path} is the part of the path that exists" in message


def test_folder_without_a_match(tmp_path: Path) -> None:
    (tmp_path / "notes.rst").touch()
    message = refusal(DataConfig(source=str(tmp_path)))
    assert "none of the 1 files" in message
    assert "notes.rst" in message
    assert "data.include" in message


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "the corpus is empty: 1 file(s)" in refusal(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize("offset", [0, 17, PIECE_BYTES - 1, PIECE_BYTES + 5])
def test_invalid_utf8_is_named_by_its_byte(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((b"abcdefghi\n" * (PIECE_BYTES // 5))[:offset] + b"\xff" + b"more\n" * 10)
    assert f"{path}: byte {offset} (0xff) is not UTF-8" in refusal(DataConfig(source=str(path)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"body": "x"}', ":2: no field 'text' (the line has body); set data.text_field"),
        ('["x"]', ":2: no field 'text' (the line is no object)"),
        ('{"text": 3}', ":2: field 'text' is int, not text"),
        ('{"text": "x"', ":2: not JSON at column 13"),
        ('{"text": "\\ud800"}', ":2: half a surrogate pair at character 0"),
    ],
)
def test_bad_json_lines_are_named_by_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    assert f"{path}{expected}" in refusal(DataConfig(source=str(path)))


def test_odd_number_of_bytes_in_a_token_file(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"\0" * 101)
    assert "101 bytes is not a whole number of uint16 tokens" in refusal(DataConfig(source=str(tmp_path / "t.bin")))


def test_text_and_token_files_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"\0\0")
    (tmp_path / "t.txt").write_text("x")
    assert "mixes token files" in refusal(DataConfig(source=(str(tmp_path / "t.bin"), str(tmp_path / "t.txt"))))


def test_a_python_without_its_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no standard library source \(\.py files\)"):
        sources.standard_library(tmp_path)


def test_a_folder_of_token_files_needs_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\1\0")
    (tmp_path / "prepare.py").write_text("x")
    found = find_files(DataConfig(source=str(tmp_path), format="nanogpt"))
    assert [file.path.name for file in found] == ["train.bin"]


def test_a_pair_is_one_file_whatever_names_it(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, [[[1, 2]], [[3]]])
    (tmp_path / "alone.bin").write_bytes(b"\1\0")
    named = [DataConfig(source=str(tmp_path / name)) for name in ("d", "d.bin", "d.idx")]
    both = DataConfig(source=str(tmp_path), include=("d.*",))
    for data in (*named, both, DataConfig(source=str(tmp_path), format="megatron")):
        (file,) = find_files(data)
        assert (file.path, file.kind) == (pair, "megatron")
        assert file.num_bytes == pair.stat().st_size + pair.with_suffix(".idx").stat().st_size
    assert [file.kind for file in find_files(DataConfig(source=str(tmp_path), include=("*.bin",)))] == [
        "nanogpt",
        "megatron",
    ]
    assert [file.kind for file in find_files(DataConfig(source=str(pair), format="nanogpt"))] == ["nanogpt"]
    pair.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"is a pair, d\.bin and d\.idx: copy both"):
        find_files(DataConfig(source=str(tmp_path / "d.idx")))
    with pytest.raises(DataError, match="no file or folder"):
        find_files(DataConfig(source=str(tmp_path / "d")))
