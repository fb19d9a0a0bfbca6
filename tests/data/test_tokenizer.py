"""Does the trained tokenizer keep every text, is it the same each time, and are bad files refused?"""

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from concertina.data.sources import Piece
from concertina.data.tokenizer import (
    END_OF_TEXT,
    PARALLELISM,
    all_cores,
    end_of_text_id,
    load_tokenizer,
    sample,
    train_tokenizer,
)
from concertina.errors import DataError

pytestmark = pytest.mark.unit

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class Accordion:\n    folds: int = 8\n" * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_bytes_and_the_end_of_text_are_always_there(tokenizer: Tokenizer) -> None:
    assert 257 < tokenizer.get_vocab_size() <= 300
    assert train_tokenizer(TEXTS, 270).get_vocab_size() == 270
    assert tokenizer.token_to_id(END_OF_TEXT) == end_of_text_id(tokenizer) == 0
    assert train_tokenizer(["ab"], 4096).get_vocab_size() < 300


def test_training_twice_gives_the_same_file(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()


@given(text=st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_other_names_of_the_end_are_known() -> None:
    assert end_of_text_id(Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))) == 1
    assert end_of_text_id(Tokenizer(models.BPE({"a": 0}, []))) is None


def test_a_given_file_loads_without_its_truncation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = Tokenizer.from_str(tokenizer.to_str())
    short.enable_truncation(4)
    short.enable_padding(length=4)
    short.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode("class Unfolded: pass").ids) > 4


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"version": "1.0", "model": {"type": "Other"}}'])
def test_a_file_that_does_not_load_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{path} \({len(content)} bytes\) does not load") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: no file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_the_sample_is_bounded_and_spread_over_the_corpus() -> None:
    pieces = [Piece(str(number), 100, True, True) for number in range(1000)]
    taken = [int(text) for text in sample(pieces, 100_000, 5_000)]
    assert len(taken) == 50
    assert max(b - a for a, b in pairwise(taken)) <= 21
    assert len(list(sample(pieces, 100_000, 10**6))) == 1000


def test_a_fork_after_parallel_work_says_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PARALLELISM, raising=False)
    for _ in range(2):
        with all_cores():
            assert os.environ[PARALLELISM] == "true"
            train_tokenizer(TEXTS, 300).encode_batch(TEXTS * 100)
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


def test_the_users_own_choice_of_parallelism_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARALLELISM, "false")
    with all_cores():
        assert os.environ[PARALLELISM] == "false"
    assert os.environ[PARALLELISM] == "false"
