"""Does a run that starts from a checkpoint's weights compute what a hand-made one does, under any layout, with moments,
schedule and data begun anew; and is a checkpoint that does not fit refused before anything starts?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concertina.config import Job
from concertina.data.tokenizer import train_tokenizer
from concertina.errors import CheckpointError, NotFoundError, UserError
from concertina.layout import Layout, Seating
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from concertina.track.run import create_run
from concertina.train.engine import Engine
from concertina.train.start import check_tokenizer, find_checkpoint, find_start, starting_from
from tests.distributed import on_ranks
from tests.train.generations import Life, on_nodes
from tests.train.worlds import engine_on, seated_engine, tiny_job, unconfigured

BASE = tiny_job(training__steps=10, model__router_bias_update_rate=0.01)
TUNE = tiny_job(
    training={"steps": 8, "seed": 7, "learning_rate": 5e-3, "warmup_steps": 2},
    model__router_bias_update_rate=0.01,
)
SEATINGS = {
    "dp4 ep2": on_nodes(Layout(4, ep=2), {0: "a", 1: "a", 2: "b", 3: "b"}),
    "tp2 ep4": on_nodes(Layout(4, tp=2, ep=4), {0: "a", 1: "a", 2: "b", 3: "b"}),
    "ep3": on_nodes(Layout(3, ep=3), {0: "a", 1: "b", 2: "c"}),
}
State = dict[str, BoxedTensor]


def written(root: Path, state: State, step: int = 10) -> Path:
    """A checkpoint of one rank's state."""
    write_part(partial_folder(root, step, 0), state, rank=0, world=1, generation=0)
    assert commit(root, step, 0, {"step": step}) is not None
    return checkpoint_folder(root, step)


def without_moments(state: State) -> State:
    """As an imported checkpoint has it."""
    return {key: boxed for key, boxed in state.items() if not key.startswith("exp_avg")}


@pytest.fixture(scope="module")
def trained() -> Engine:
    """One process after all steps of BASE."""
    engine = engine_on(BASE, Layout(1), 0, None)
    for step in range(1, BASE.training.steps + 1):
        engine.train_step(step)
    engine.settle()
    return engine


@pytest.fixture(scope="module")
def base(trained: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base"), trained.state())


def tuned(engine: Engine) -> dict[str, Any]:
    losses = [engine.train_step(step).loss for step in range(1, TUNE.training.steps + 1)]
    return {"losses": losses, "validation": engine.evaluate(), "updates": engine.optimizer.updates}


def alone(folder: Path) -> dict[str, Any]:
    engine = engine_on(TUNE, Layout(1), 0, None)
    engine.start_anew(folder)
    return tuned(engine)


def deviation(found: dict[str, Any], expected: dict[str, Any]) -> float:
    pairs = zip([*found["losses"], found["validation"]], [*expected["losses"], expected["validation"]], strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def by_hand(trained: Engine, *more: str) -> dict[str, Any]:
    """A fresh engine that was given weights and biases, and `more`, element by element from one that was trained."""
    engine = engine_on(TUNE, Layout(1), 0, None)
    for key, boxed in engine.state().items():
        if key.startswith(("master/", "buffer/", *more)):
            boxed.piece.copy_(trained.state()[key].piece)
    engine.optimizer.publish()
    return tuned(engine)


@pytest.fixture(scope="module")
def reference(trained: Engine) -> dict[str, Any]:
    return by_hand(trained)


@pytest.mark.dist
def test_one_process_is_the_hand_made_one_to_the_bit(base: Path, reference: dict[str, Any]) -> None:
    assert alone(base) == reference


@pytest.mark.dist
def test_it_begins_where_the_weights_are_and_everything_else_anew(
    base: Path, trained: Engine, reference: dict[str, Any]
) -> None:
    engine = engine_on(TUNE, Layout(1), 0, None)
    random = engine.evaluate()
    engine.start_anew(base)
    assert (engine.applied, engine.tokens, engine.optimizer.updates) == (0, 0, 0)
    assert engine.evaluate() == trained.evaluate() < 0.95 * random
    for key, boxed in engine.state().items():
        if key.startswith("exp_avg"):
            assert not boxed.piece.any(), key
    first = engine.train_step(1)
    assert first.learning_rate == TUNE.training.learning_rate / TUNE.training.warmup_steps
    assert engine.sampler.batch(0) != trained.sampler.batch(0)
    assert first.loss == reference["losses"][0]


@pytest.mark.dist
@pytest.mark.parametrize("more", ["exp_avg/", "exp_avg_sq/"])
def test_a_moment_that_is_kept_is_seen(more: str, trained: Engine, reference: dict[str, Any]) -> None:
    assert deviation(by_hand(trained, more), reference) > 1e-6


@pytest.mark.dist
def test_a_bias_that_is_left_out_is_seen(trained: Engine, reference: dict[str, Any], tmp_path: Path) -> None:
    state = {key: boxed for key, boxed in trained.state().items() if key.startswith("master/")}
    biases = {key: boxed for key, boxed in trained.state().items() if key.startswith("buffer/")}
    zero = {key: BoxedTensor(torch.zeros_like(b.piece), b.box, tuple(b.shape)) for key, b in biases.items()}
    assert deviation(alone(written(tmp_path, state | zero)), reference) > 1e-6
    with pytest.raises(CheckpointError, match="has no tensor buffer/"):
        alone(written(tmp_path / "none", state))


@pytest.mark.dist
def test_moments_may_be_absent_and_precision_another(
    trained: Engine, reference: dict[str, Any], tmp_path: Path
) -> None:
    assert alone(written(tmp_path / "64", without_moments(trained.state()))) == reference
    single = {
        key: BoxedTensor(boxed.piece.float(), boxed.box, tuple(boxed.shape))
        for key, boxed in without_moments(trained.state()).items()
    }
    engine = engine_on(TUNE, Layout(1), 0, None)
    engine.start_anew(written(tmp_path / "32", single))
    for key, boxed in single.items():
        assert torch.equal(engine.state()[key].piece, boxed.piece.double()), key


def tune_on(rank: int, store: Any, seating: Seating, folder: Path) -> dict[str, Any]:
    """One rank's fine-tuning, and whether what it keeps for others is what they have."""
    life = Life(rank, store, TUNE, unconfigured(TUNE))
    share, _ = life.form(0, seating)
    assert share is not None
    life.engine.adopt(share, publish=False)
    life.engine.start_anew(folder)
    copies = share.seconds.copies.values()
    kept = {key: piece.numpy().copy() for copy in copies for key, (_, piece) in copy.pieces().items()}
    own = {key: (boxed.box.slices(), boxed.piece.numpy().copy()) for key, boxed in life.engine.state().items()}
    return {**tuned(life.engine), "kept": kept, "own": own, "firsts": seating.firsts(rank)}


@pytest.mark.dist
@pytest.mark.parametrize("name", SEATINGS)
def test_any_layout_goes_the_same_way(name: str, base: Path, reference: dict[str, Any], trained: Engine) -> None:
    """Step for step, with second owners that hold the weights from the first step on."""
    seating = SEATINGS[name]
    ranks = on_ranks(tune_on, seating.layout.world, seating, base)
    weights = {key: boxed.piece.numpy() for key, boxed in trained.state().items()}
    for found in ranks:
        assert deviation(found, reference) < 1e-10
        assert found["firsts"]
        for first in found["firsts"]:
            for key, (_, piece) in ranks[first]["own"].items():
                if not key.startswith("buffer/"):
                    assert np.array_equal(found["kept"][key], piece), key
        for key, (place, piece) in found["own"].items():
            expected = np.zeros_like(piece) if key.startswith("exp_avg") else weights[key][place]
            assert np.array_equal(piece, expected), key


# -- before anything starts --------------------------------------------------------------------------------------------


def tuning(**changes: Any) -> Job:
    return tiny_job(**{"model__router_bias_update_rate": 0.01, **changes})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of weights that were never trained, in a run's folder."""
    run = create_run(tmp_path / "runs", tuning(), run_id="base")
    written(run.checkpoints, without_moments(seated_engine(tuning(), Layout(1), 0).state()), 5)
    return written(run.checkpoints, without_moments(seated_engine(tuning(), Layout(1), 0).state()), 10)


@pytest.mark.unit
def test_a_checkpoint_has_many_names(small: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in (str(small), str(small.parent), str(runs / "base"), "base", "bas", "latest"):
        assert find_checkpoint(name, runs) == small
    assert find_checkpoint(str(small.with_name("step-00000005")), runs).name == "step-00000005"
    assert find_start(tuning(storage_path=str(runs), checkpoint__initial_load_path="base")) == small
    assert find_start(tuning()) is None


@pytest.mark.unit
def test_what_is_not_there_or_is_damaged(small: Path, tmp_path: Path) -> None:
    where = str(tmp_path / "runs")
    with pytest.raises(NotFoundError, match=r"checkpoint\.initial_load_path: no run 'bose' under .*did you mean base"):
        find_start(tuning(storage_path=where, checkpoint__initial_load_path="bose"))
    create_run(tmp_path / "runs", tuning(), run_id="empty")
    with pytest.raises(NotFoundError, match=r"checkpoint\.initial_load_path: no complete checkpoint in .*empty"):
        find_start(tuning(storage_path=where, checkpoint__initial_load_path="empty"))
    (file,) = small.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        find_start(tuning(checkpoint__initial_load_path=str(small)))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__hidden_size": 64}, r"embedding.weight has shape (97, 32) in the checkpoint, and has shape (97, 64)"),
        ({"model__num_hidden_layers": 2}, "layers.2.moe.bias has shape (8,) in the checkpoint, and is not there"),
        ({"model__router_bias_update_rate": 0.0}, "layers.1.moe.bias has shape (8,) in the checkpoint, and is not"),
    ],
)
def test_another_model_is_refused_with_the_numbers(changes: dict[str, Any], said: str, small: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_start(tuning(checkpoint__initial_load_path=str(small), **changes))
    text = str(caught.value)
    assert "\n" not in text
    assert f"{small} is of another model" in text
    assert said in text
    assert text.endswith("give model.* the checkpoint's shapes, or start from another")


@pytest.mark.unit
def test_tokens_must_mean_the_same(small: Path, tmp_path: Path) -> None:
    one, other, more = (tmp_path / f"{name}.json" for name in ("one", "other", "more"))
    train_tokenizer(["bellows and reeds " * 9], 290).save(str(one))
    train_tokenizer(["keys and buttons " * 9], 290).save(str(other))
    document = json.loads(one.read_text())
    (tmp_path / "runs" / "base" / "tokenizer.json").write_text(json.dumps(document, indent=1))
    check_tokenizer(small, one)
    tokenizer = train_tokenizer(["bellows and reeds " * 9], 290)
    tokenizer.add_tokens(["<turn>"])
    tokenizer.save(str(more))
    check_tokenizer(small, more)
    theirs = tmp_path / "runs" / "base" / "tokenizer.json"
    with pytest.raises(UserError, match=r"trained with another tokenizer: token '.*' is 2.. there and is") as caught:
        check_tokenizer(small, other)
    assert str(caught.value).endswith(f"set data.tokenizer.path to {theirs}")
    (small / "tokenizer.json").write_text(other.read_text())
    check_tokenizer(small, other)  # what lies beside a checkpoint is nearer


@pytest.mark.unit
def test_a_name_is_resolved_once() -> None:
    job = tuning(checkpoint__initial_load_path="latest")
    assert starting_from(job, "/a/b").checkpoint.initial_load_path == "/a/b"
    assert starting_from(job, None).checkpoint == job.checkpoint.model_copy(update={"initial_load_path": None})
