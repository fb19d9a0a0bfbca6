"""Is a corpus built once, whole or not at all, by however many at once, and again when what goes in has changed?"""

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from concertina.config.schema import DataConfig, TokenizerConfig
from concertina.data.corpus import TokenCorpus, sha256_of
from concertina.data.mixture import Mixture
from concertina.data.prepare import corpus_folder, fingerprint, prepare
from concertina.data.sources import find_files
from concertina.data.tokenizer import END_OF_TEXT, train_tokenizer
from concertina.errors import DataError
from tests.data.test_token_files import write_pair

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


def test_one_token_file_stays_where_it_is(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", [5, 6, 50, 7])
    said: list[str] = []
    folder = prepare(
        DataConfig(source=str(path), document_token=50), tmp_path, 51, lambda what, done, total: said.append(what)
    )
    corpus = TokenCorpus.open(folder)
    assert said == ["reading tokens"]
    assert corpus.tokens.tolist() == [5, 6, 50, 7]
    assert corpus.documents.tolist() == [0, 3]
    assert sorted(file.name for file in folder.iterdir()) == ["documents.bin", "manifest.json"]
    corpus.verify()
    status = path.stat()
    write_tokens(path, [5, 6, 50, 8])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    TokenCorpus.open(folder)  # as before: contents are compared where times differ, or when asked for
    with pytest.raises(DataError, match=f"a.bin was altered.*delete the folder {folder} and run"):
        corpus.verify()
    write_tokens(path, [5, 6])
    with pytest.raises(DataError, match=r"a\.bin is truncated: manifest\.json says 8 bytes, the file has 4"):
        TokenCorpus.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"a.bin is missing; delete the folder {folder} and run"):
        TokenCorpus.open(folder)


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
def test_megatron_documents_are_those_of_the_index(code: int, dtype: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, [[[1, 2], [3]], [[4]], [[5, 6, 7]]], code, dtype)
    for data in (DataConfig(source=str(pair)), DataConfig(source=str(pair), document_token=2)):
        corpus = TokenCorpus.open(prepare(data, tmp_path / "runs", 8))
        assert corpus.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert corpus.documents.tolist() == [0, 3, 4]
        assert Path(corpus.manifest.tokens) == pair
        train, _ = corpus.sequences(3, 0.0)
        assert train.read([0])[1].tolist() == [[2, 3, -100]], "the next token begins another document"
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 1, "one corpus: the index says where documents start"
    other = write_tokens(tmp_path / "more.bin", [9, 10])
    (tmp_path / "two").mkdir()
    second = write_pair(tmp_path / "two", [[[8, 9]], [[70000 if dtype[-1] in "48" else 10]]], code, dtype)
    both = TokenCorpus.open(prepare(DataConfig(source=(str(pair), str(second))), tmp_path / "runs", 100_000))
    assert both.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 70000 if dtype[-1] in "48" else 10]
    assert both.documents.tolist() == [0, 3, 4, 7, 9]
    assert both.manifest.tokens == "tokens.bin"
    mixed = TokenCorpus.open(prepare(DataConfig(source=(str(other), str(pair))), tmp_path / "runs", 11))
    assert mixed.documents.tolist() == [0, 2, 5, 6]


def test_a_pair_that_changes_is_another_corpus(tmp_path: Path) -> None:
    data = DataConfig(source=str(write_pair(tmp_path, [[[1, 2]], [[3]]])))
    before = prepare(data, tmp_path / "runs", 4)
    write_pair(tmp_path, [[[1, 2], [3]]])
    assert prepare(data, tmp_path / "runs", 4) != before


def test_numbers_that_are_no_token_ids_are_named(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, [[[1, 2]], [[3, -7]]])
    with pytest.raises(DataError, match=r"-7 at position 3 is no token id"):
        prepare(DataConfig(source=str(pair)), tmp_path / "runs", 100)
    assert list((tmp_path / "runs" / "data").iterdir()) == []


def test_half_of_a_pair(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, [[[1, 2]]])
    pair.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"a token file of Megatron's is a pair, d\.bin and d\.idx: copy both"):
        prepare(DataConfig(source=str(pair), format="megatron"), tmp_path / "runs", 100)


def mixture(texts: Path, **sources: object) -> DataConfig:
    parts = {"even": {"source": [str(texts / f"{n}.txt") for n in (0, 2, 4)]}, "odd": {"source": str(texts / "1.txt")}}
    return DataConfig.model_validate(
        {"sources": {**parts, **sources}, "tokenizer": TokenizerConfig(vocab_size=VOCAB), "sequence_length": 8}
    )


def test_a_mixture_is_corpora_cut_by_one_tokenizer(texts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = prepare(mixture(texts), tmp_path, VOCAB, lambda what, done, total: said.append(what))
    assert said.count("training the tokenizer") == 1
    assert corpus_folder(mixture(texts), tmp_path) == folder
    mixed = Mixture.open(folder)
    assert list(mixed.corpora) == ["even", "odd"]
    assert len({sha256_of(corpus.folder / "tokenizer.json") for corpus in mixed.corpora.values()}) == 1
    assert mixed.corpora["odd"].decode(mixed.corpora["odd"].tokens.tolist()) == (
        (texts / "1.txt").read_text() + END_OF_TEXT
    )
    assert mixed.num_documents == 4
    assert mixed.tokenizer_file is not None
    assert sha256_of(mixed.tokenizer_file) == sha256_of(mixed.corpora["odd"].folder / "tokenizer.json")
    mixed.verify()
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(
        [folder.name, *(corpus.fingerprint for corpus in mixed.corpora.values())]
    )


def corpora_of(folder: Path) -> dict[str, str]:
    return {name: corpus.fingerprint for name, corpus in Mixture.open(folder).corpora.items()}


def test_weights_cut_nothing_anew_and_sources_do(texts: Path, tmp_path: Path) -> None:
    odd = str(texts / "1.txt")
    first = prepare(mixture(texts), tmp_path, VOCAB)
    said: list[str] = []
    heavier = mixture(texts, odd={"source": odd, "weight": 3.0})
    second = prepare(heavier, tmp_path, VOCAB, lambda what, done, total: said.append(what))
    assert said == []
    assert first != second, "a resume with other weights is one with other data"
    assert corpora_of(first) == corpora_of(second)
    third = prepare(mixture(texts, more={"source": str(texts / "3.txt")}), tmp_path, VOCAB)
    assert not set(corpora_of(first).values()) & set(corpora_of(third).values()), "the tokenizer is another"


def test_a_corpus_of_a_mixture_that_is_lost_is_cut_with_the_tokenizer_there_is(texts: Path, tmp_path: Path) -> None:
    folder = prepare(mixture(texts), tmp_path, VOCAB)
    corpora = Mixture.open(folder).corpora
    before = corpora["even"].content_sha256
    shutil.rmtree(corpora["even"].folder)
    said: list[str] = []
    assert prepare(mixture(texts), tmp_path, VOCAB, lambda what, done, total: said.append(what)) == folder
    assert set(said) == {"tokenizing"}
    assert Mixture.open(folder).corpora["even"].content_sha256 == before


def test_a_lone_source_shares_the_corpus_of_a_job_without_a_mixture(texts: Path, tmp_path: Path) -> None:
    lone = DataConfig.model_validate(
        {"sources": {"all": {"source": str(texts)}}, "tokenizer": TokenizerConfig(vocab_size=VOCAB)}
    )
    (found,) = Mixture.open(prepare(lone, tmp_path, VOCAB)).corpora.values()
    assert found.folder == prepare(config(texts), tmp_path, VOCAB)


def test_errors_of_a_mixture_name_the_source(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source bad: data\.source: no file or folder /no/such"):
        prepare(mixture(texts, bad={"source": "/no/such"}), tmp_path, VOCAB)
    (tmp_path / "x.jsonl").write_text("no")
    with pytest.raises(DataError, match=r"x\.jsonl:1: not JSON"):
        prepare(mixture(texts, bad={"source": str(tmp_path / "x.jsonl")}), tmp_path, VOCAB)
    tokens = write_tokens(tmp_path / "t.bin", [1, 2, 3])
    with pytest.raises(DataError, match=r"data\.sources mixes tokens \(bad\) with text \(even\).*tokenizer\.path"):
        prepare(mixture(texts, bad={"source": str(tokens)}), tmp_path, VOCAB)


def test_tokens_and_text_mix_with_the_tokenizer_of_the_tokens(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    train_tokenizer(["folds of documents\n" * 9], 280).save(str(path))
    tokens = write_tokens(tmp_path / "t.bin", [1, 2, 3] * 9)
    data = mixture(texts, tokens={"source": str(tokens)})
    data = data.model_copy(update={"tokenizer": TokenizerConfig(path=str(path))})
    mixed = Mixture.open(prepare(data, tmp_path, VOCAB))
    assert mixed.corpora["tokens"].tokens.tolist() == [1, 2, 3] * 9
    assert mixed.tokenizer_file is not None


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
