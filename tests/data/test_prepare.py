"""Is a corpus built once, whole or not at all, by however many at once, and again when what goes in has changed?"""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from concertina.config.schema import DataConfig, TokenizerConfig
from concertina.data.corpus import TokenCorpus
from concertina.data.prepare import fingerprint, prepare
from concertina.data.sources import find_files
from concertina.data.tokenizer import END_OF_TEXT, train_tokenizer
from concertina.errors import DataError

pytestmark = pytest.mark.unit

VOCAB = 300


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"document {number} of folds\n" * (10 + number))
    return folder


def config(source: Path | str, **settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"source": str(source), "tokenizer": TokenizerConfig(vocab_size=VOCAB), **settings}
    )


def write_tokens(path: Path, tokens: list[int]) -> Path:
    np.array(tokens, dtype="<u2").tofile(path)
    return path


def test_text_comes_back_document_by_document(texts: Path, tmp_path: Path) -> None:
    corpus = TokenCorpus.open(prepare(config(texts), tmp_path / "runs", VOCAB))
    assert corpus.folder.parent == tmp_path / "runs" / "data"
    assert corpus.folder.name == corpus.fingerprint
    assert len(corpus.fingerprint) <= 36
    ends = [*corpus.documents[1:].tolist(), corpus.num_tokens]
    documents = [corpus.decode(corpus.tokens[a:b].tolist()) for a, b in zip(corpus.documents, ends, strict=True)]
    assert documents == [path.read_text() + END_OF_TEXT for path in sorted(texts.iterdir())]
    assert corpus.manifest.text_bytes == sum(path.stat().st_size for path in texts.iterdir())
    assert corpus.tokens.dtype == np.uint16
    corpus.verify()


def test_the_second_call_builds_nothing(texts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(config(texts), tmp_path, VOCAB, lambda what, done, total: said.append(what))
    assert said[0] == "training the tokenizer"
    assert said[-1] == "tokenizing"
    said.clear()
    assert prepare(config(texts), tmp_path, VOCAB, lambda what, done, total: said.append(what)) == first
    assert said == []
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_the_fingerprint_follows_what_goes_in_and_nothing_else(texts: Path, tmp_path: Path) -> None:
    def of(**settings: object) -> str:
        data = config(texts, **settings)
        return fingerprint(find_files(data), data)

    assert of() == of(sequence_length=8, validation_fraction=0.3, text_field="body", document_token=3)
    assert len({of(), of(max_bytes=50), of(tokenizer=TokenizerConfig(vocab_size=299))}) == 3
    before = of()
    (texts / "0.txt").write_text("document 9 of folds\n" * 10)
    os.utime(texts / "0.txt", ns=(1, 1))
    assert of() != before


def test_two_preparations_give_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    one, two = (TokenCorpus.open(prepare(config(texts), tmp_path / name, VOCAB)) for name in "ab")
    assert one.content_sha256 == two.content_sha256
    assert one.fingerprint == two.fingerprint


def test_preparers_at_once_agree(texts: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: prepare(config(texts), tmp_path, VOCAB), range(4)))
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]


def test_a_failed_preparation_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    (texts / "9.txt").write_bytes(b"abc\xfe")
    with pytest.raises(DataError, match="byte 3"):
        prepare(config(texts), tmp_path, VOCAB)
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_killed_preparer_left_is_removed(texts: Path, tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    here = socket.gethostname()
    left_over = tmp_path / "data" / f".{'0' * 32}.{here}.{killed.pid}.12345678"
    at_work = tmp_path / "data" / f".{'0' * 32}.{here}.{os.getpid()}.12345678"
    for folder in (left_over, at_work):
        folder.mkdir(parents=True)
    prepare(config(texts), tmp_path, VOCAB)
    assert not left_over.exists()
    assert at_work.exists()


def test_the_end_of_text_written_in_a_document_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"before {END_OF_TEXT} after")
    corpus = TokenCorpus.open(prepare(config(tmp_path / "a.txt"), tmp_path, VOCAB))
    assert np.flatnonzero(corpus.tokens == 0).tolist() == [corpus.num_tokens - 1]
    assert corpus.decode(corpus.tokens.tolist()) == f"before {END_OF_TEXT} after{END_OF_TEXT}"


def test_a_given_tokenizer_is_used_and_kept(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    train_tokenizer(["folds of documents\n" * 9], 280).save(str(path))
    data = config(texts, tokenizer=TokenizerConfig(path=str(path)))
    corpus = TokenCorpus.open(prepare(data, tmp_path, VOCAB))
    assert corpus.vocab_size == Tokenizer.from_file(str(path)).get_vocab_size()
    path.unlink()
    assert corpus.decode(corpus.tokens[:4].tolist()) is not None


def test_large_vocabularies_take_four_bytes_a_token(texts: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["x"], 257)
    tokenizer.add_tokens([f"word{i}" for i in range(1 << 16)])
    tokenizer.save(str(tmp_path / "large.json"))
    (texts / "7.txt").write_text("word65535")
    data = config(texts, tokenizer=TokenizerConfig(path=str(tmp_path / "large.json")))
    corpus = TokenCorpus.open(prepare(data, tmp_path, 1 << 17))
    assert corpus.tokens.dtype == np.uint32
    assert corpus.manifest.largest_token == 257 + 65535


def test_a_tokenizer_larger_than_the_model_is_refused_before_the_work(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 300 tokens, more than model\.vocab_size=256") as caught:
        prepare(config(texts), tmp_path, 256)
    assert "set model.vocab_size to 300" in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_nanogpt_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a.bin", [5, 6, 50, 7, 8, 50])
    second = write_tokens(tmp_path / "b.bin", [9, 50, 10])
    data = DataConfig(source=(str(first), str(second)), document_token=50)
    corpus = TokenCorpus.open(prepare(data, tmp_path, 51))
    assert corpus.tokens.tolist() == [5, 6, 50, 7, 8, 50, 9, 50, 10]
    assert corpus.documents.tolist() == [0, 3, 6, 8]
    assert corpus.manifest.end_of_text == 50
    assert corpus.decode([5]) is None
    whole = TokenCorpus.open(prepare(DataConfig(source=(str(first), str(second))), tmp_path, 51))
    assert whole.documents.tolist() == [0, 6]
    cut = TokenCorpus.open(prepare(DataConfig(source=(str(first), str(second)), max_bytes=14), tmp_path, 51))
    assert cut.tokens.tolist() == [5, 6, 50, 7, 8, 50, 9]


def test_a_token_out_of_vocabulary_is_named(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", [1, 2, 77, 99])
    for _ in range(2):  # freshly built, and recognised
        with pytest.raises(DataError, match=r"token id 77 at position 2 .* model.vocab_size=50 has ids 0 to 49") as e:
            prepare(DataConfig(source=str(path)), tmp_path, 50)
        assert "set model.vocab_size to 100 or more" in str(e.value)


def test_a_part_of_the_standard_library(tmp_path: Path) -> None:
    data = DataConfig(max_bytes=300_000, tokenizer=TokenizerConfig(vocab_size=512))
    corpus = TokenCorpus.open(prepare(data, tmp_path, 512))
    assert corpus.manifest.text_bytes == 300_000
    train, validation = corpus.sequences(64, 0.02)
    tokens_BS, targets_BS = train.read([0, len(train) - 1])
    assert tokens_BS.shape == targets_BS.shape == (2, 64)
    assert len(validation) > 0


def test_a_storage_that_cannot_be_written_is_one_line(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*; set storage_path") as caught:
        prepare(config(texts), tmp_path / "file", VOCAB)
    assert "\n" not in str(caught.value)
