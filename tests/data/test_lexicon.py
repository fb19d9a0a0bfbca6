"""Is a tokenizer trained once for all texts, on each by its size, and known before it is trained?"""

from __future__ import annotations

from pathlib import Path

import pytest

from concertina.config import DataConfig, TokenizerConfig
from concertina.data.lexicon import Lexicon, Texts
from concertina.data.sources import find_files
from concertina.errors import DataError

pytestmark = pytest.mark.unit

CONFIG = TokenizerConfig(vocab_size=300)


@pytest.fixture
def texts(tmp_path: Path) -> list[Texts]:
    found = []
    for name, word in (("a", "bellows"), ("b", "reeds")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 400)
        data = DataConfig(source=str(tmp_path / f"{name}.txt"))
        found.append((find_files(data), data))
    return found


def test_it_is_trained_once_on_all_texts(texts: list[Texts]) -> None:
    heard: list[int] = []
    lexicon = Lexicon(CONFIG, texts)
    one = lexicon.tokenizer(heard.append)
    assert lexicon.tokenizer(heard.append) is one
    assert heard == [400 * len("bellows ") + 400 * len("reeds ")]
    words = one.get_vocab()
    assert {"bellows", "reeds"} <= {token.strip("Ġ") for token in words}
    assert "reeds" not in {token.strip("Ġ") for token in Lexicon(CONFIG, texts[:1]).tokenizer(heard.append).get_vocab()}


def test_what_it_is_known_by(texts: list[Texts], tmp_path: Path) -> None:
    both = Lexicon(CONFIG, texts).identity
    assert Lexicon(CONFIG, texts).identity == both
    assert len(Lexicon(CONFIG, texts[:1]).identity) == 2, "as of a job without a mixture"
    assert Lexicon(TokenizerConfig(vocab_size=301), texts).identity != both
    files, data = texts[1]
    assert Lexicon(CONFIG, [texts[0], (files, data.model_copy(update={"max_bytes": 9}))]).identity != both
    (tmp_path / "b.txt").write_text("other reeds")
    assert Lexicon(CONFIG, [texts[0], (find_files(data), data)]).identity != both


def test_one_that_is_given_is_not_trained(texts: list[Texts], tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    trained = Lexicon(CONFIG, texts).tokenizer(lambda total: None)
    trained.save(str(path))
    given = Lexicon(TokenizerConfig(path=str(path)), texts)
    assert given.size == (trained.get_vocab_size(), str(path))
    assert given.tokenizer(lambda total: pytest.fail("trained")).get_vocab() == trained.get_vocab()
    known = Lexicon(CONFIG, texts)
    known.take(path)
    assert known.tokenizer(lambda total: pytest.fail("trained")).get_vocab() == trained.get_vocab()
    path.unlink()
    with pytest.raises(DataError, match=r"data\.tokenizer\.path: no file"):
        _ = given.identity
