"""Is a torn or altered corpus refused in one line, and a whole one opened, copied or not?"""

import json
import os
import shutil
from pathlib import Path

import pytest

from concertina.config.schema import DataConfig, TokenizerConfig
from concertina.data.corpus import TokenCorpus
from concertina.data.prepare import prepare
from concertina.errors import DataError

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("folds and stretches\n" * 50)
    data = DataConfig(source=str(tmp_path / "a.txt"), tokenizer=TokenizerConfig(vocab_size=280))
    return prepare(data, tmp_path, 280)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        TokenCorpus.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_copy_opens(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    TokenCorpus.open(tmp_path / "copy").verify()


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokenizer.json"])
def test_a_truncated_file(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 3)
    assert f"{name} is truncated: manifest.json says {size} bytes, the file has {size - 3}" in refusal(folder)


def test_a_file_that_grew(folder: Path) -> None:
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"\0\0")
    assert "tokens.bin is longer than written" in refusal(folder)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokenizer.json"])
def test_an_altered_file(folder: Path, name: str) -> None:
    alter(folder / name)
    message = refusal(folder)
    assert f"{name} was altered: manifest.json says sha256" in message
    assert f"delete the folder {folder}" in message


def test_an_altered_file_under_its_old_time_is_found_by_verify(folder: Path) -> None:
    times = (folder / "tokens.bin").stat()
    alter(folder / "tokens.bin")
    os.utime(folder / "tokens.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    corpus = TokenCorpus.open(folder)
    with pytest.raises(DataError, match=r"tokens\.bin was altered"):
        corpus.verify()


def test_a_missing_file(folder: Path) -> None:
    (folder / "documents.bin").unlink()
    assert "documents.bin is missing" in refusal(folder)


def test_no_manifest(tmp_path: Path) -> None:
    assert f"{tmp_path} is not a prepared corpus: it has no manifest.json" in refusal(tmp_path)


def test_a_torn_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 40)
    assert "manifest.json: the file: Invalid JSON" in refusal(folder)


def test_another_format_and_a_manifest_without_tokens(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    assert "format_version: Input should be 1" in refusal(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}, "new_key": 1}))
    assert "does not list documents.bin, tokens.bin" in refusal(folder)


def test_a_broken_manifest_stops_prepare_too(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "tokens.bin", 4)
    data = DataConfig(source=str(tmp_path / "a.txt"), tokenizer=TokenizerConfig(vocab_size=280))
    with pytest.raises(DataError, match="truncated"):
        prepare(data, tmp_path, 280)


def alter(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
