"""Does a mixture read as its corpora do, hold out of each what each alone would, and say when it is not whole?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concertina.config import DataConfig, TokenizerConfig
from concertina.data.blend import BlendedSampler
from concertina.data.mixture import Mixture, MixtureManifest, MixtureView, make_sampler, open_corpus, parts_of
from concertina.data.prepare import prepare
from concertina.data.sampler import GlobalSampler
from concertina.errors import DataError

pytestmark = pytest.mark.unit

LENGTH, HELD_OUT = 16, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixture")
    for name, lines in (("long", 900), ("short", 120)):
        (place / f"{name}.txt").write_text("".join(f"{name} line {number} of folds\n" for number in range(lines)))
    data = DataConfig.model_validate(
        {
            "sources": {
                name: {"source": str(place / f"{name}.txt"), "weight": w} for name, w in (("short", 3.0), ("long", 1.0))
            },
            "tokenizer": TokenizerConfig(vocab_size=300),
        }
    )
    return prepare(data, place, 300)


@pytest.fixture
def mixture(folder: Path) -> Mixture:
    return Mixture.open(folder)


def test_ids_number_one_source_after_another(mixture: Mixture) -> None:
    for side in (0, 1):
        view = mixture.sequences(LENGTH, HELD_OUT)[side]
        assert isinstance(view, MixtureView)
        alone = [corpus.sequences(LENGTH, HELD_OUT)[side] for corpus in mixture.corpora.values()]
        assert [part.name for part in view.parts] == ["long", "short"]
        assert len(view) == sum(map(len, alone))
        everything = [one.read(range(len(one))) for one in alone]
        tokens, targets = view.read(range(len(view)))
        assert torch.equal(tokens, torch.cat([pair[0] for pair in everything]))
        assert torch.equal(targets, torch.cat([pair[1] for pair in everything]))
        starts = [one.document_starts(index) for one in alone for index in range(len(one))]
        assert [view.document_starts(index) for index in range(len(view))] == starts
        assert view.read([])[0].shape == (0, LENGTH)


def test_weights_are_of_all(mixture: Mixture) -> None:
    assert mixture.weights == {"long": 0.25, "short": 0.75}
    train, _ = mixture.sequences(LENGTH, HELD_OUT)
    assert [part.weight for part in parts_of(train)] == [0.25, 0.75]
    sampler = make_sampler(train, 8, 5)
    assert isinstance(sampler, BlendedSampler)
    first = len(parts_of(train)[0].sequences)
    assert [sum(i < first for i in sampler.batch(step)) for step in range(5)] == [2] * 5


def test_a_corpus_alone_is_drawn_as_ever(mixture: Mixture) -> None:
    train, _ = mixture.corpora["long"].sequences(LENGTH, HELD_OUT)
    (part,) = parts_of(train)
    assert (part.name, part.weight, part.sequences) == ("", 1.0, train)
    assert make_sampler(train, 8, 5).batch(3) == GlobalSampler(len(train), 8, 5).batch(3)


def test_the_fingerprint_follows_names_weights_corpora_and_their_order() -> None:
    parts = {"a": (1.0, "x" * 32), "b": (2.0, "y" * 32)}
    others = [
        {"a": (1.0, "x" * 32), "b": (3.0, "y" * 32)},
        {"a": (1.0, "x" * 32), "c": (2.0, "y" * 32)},
        {"a": (1.0, "x" * 32), "b": (2.0, "z" * 32)},
        {"b": (2.0, "y" * 32), "a": (1.0, "x" * 32)},
    ]
    assert MixtureManifest.of(parts) == MixtureManifest.of(dict(parts))
    assert len({MixtureManifest.of(found).fingerprint for found in [parts, *others]}) == 5


def test_a_source_that_is_too_small_is_named(mixture: Mixture) -> None:
    with pytest.raises(DataError, match=r"source short: the corpus has .* tokens, too few for 2 sequence"):
        mixture.sequences(2000, HELD_OUT)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data" / folder.name
    copy.mkdir(parents=True)
    text = (folder / "mixture.json").read_text()
    (copy / "mixture.json").write_text(text)
    with pytest.raises(DataError, match=r"is not a prepared corpus: it has no manifest\.json"):
        open_corpus(copy)
    (copy / "mixture.json").write_text(text.replace('"parts"', '"pairs"'))
    with pytest.raises(DataError, match=f"mixture.json: Field required; delete the folder {copy} and run"):
        open_corpus(copy)
