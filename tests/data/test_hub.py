"""Is a dataset's name read as it is meant, and refused in one line where nobody can find it?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from concertina.data.hub import dataset_files
from concertina.errors import DataError

pytestmark = pytest.mark.unit

HERE = importlib.util.find_spec("datasets") is not None


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
def test_no_name(source: str) -> None:
    with pytest.raises(DataError, match="is no dataset: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        dataset_files(source)


@pytest.mark.skipif(HERE, reason="datasets is installed")
def test_without_the_package_the_remedy_is_named() -> None:
    with pytest.raises(DataError, match=r"hf:some/text needs the package datasets: pip install 'concertina\[data\]'"):
        dataset_files("hf:some/text")


@pytest.mark.skipif(not HERE, reason="datasets is not installed: pip install -e '.[data]'")
def test_what_datasets_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (file,) = dataset_files(f"hf:{tmp_path / 'd'}")
    assert file.suffix == ".arrow"
    assert dataset_files(f"hf:{tmp_path / 'd'}:train") == [file]
    with pytest.raises(DataError, match="datasets finds no such data: Unknown split"):
        dataset_files(f"hf:{tmp_path / 'd'}:test")
