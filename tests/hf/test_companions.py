"""What comes along with weights: settings that were imported, or those that follow from the tokenizer?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concertina.config import ModelConfig
from concertina.data.tokenizer import END_OF_TEXT, train_tokenizer
from concertina.hf.companions import add_tokenizer, generation_config, model_card, special_tokens

pytestmark = pytest.mark.unit


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    train_tokenizer(["some words"], 300).save(str(folder / "tokenizer.json"))
    return folder


def test_special_tokens(corpus: Path, tmp_path: Path) -> None:
    assert special_tokens(None) == {}
    assert special_tokens(tmp_path) == {}
    assert special_tokens(corpus) == {"eos_token_id": 0}
    (corpus / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    assert special_tokens(corpus) == {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": None}


def test_a_tokenizer_gets_settings_where_it_has_none(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    assert add_tokenizer(corpus, tmp_path / "one", 64)
    settings = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 64
    assert settings["eos_token"] == END_OF_TEXT
    (corpus / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (corpus / "merges.txt").write_text("a b")
    assert add_tokenizer(corpus, tmp_path / "two", 64)
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    assert (tmp_path / "two" / "merges.txt").exists()
    assert not add_tokenizer(tmp_path, tmp_path / "three", 64)
    assert not add_tokenizer(None, tmp_path / "three", 64)
    assert list((tmp_path / "three").iterdir()) == []


def test_generation_settings_of_an_import_stay(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    generation_config(tmp_path / "from", tmp_path, {"eos_token_id": 3, "bos_token_id": None})
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == 3
    assert "bos_token_id" not in written
    (tmp_path / "from" / "generation_config.json").write_text('{"temperature": 0.5}')
    generation_config(tmp_path / "from", tmp_path, {})
    assert (tmp_path / "generation_config.json").read_text() == '{"temperature": 0.5}'


def test_the_card_leaves_out_what_is_not_known() -> None:
    card = model_card("a-run", ModelConfig(), {"step": 7, "validation loss": None})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| step | 7 |" in card
    assert "validation loss" not in card
