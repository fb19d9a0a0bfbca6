"""Is what a run starts from settled before anything starts, kept when it begins again, and left alone once it has a
checkpoint of its own; and is a mixture data like any other?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from concertina.config import load_job
from concertina.errors import DataError, NotFoundError, UserError
from concertina.layout import Layout
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from concertina.track.run import RunFolder, list_runs
from concertina.track.summary import summarize
from jobs.preparation import Prepared, refuse_stages_on_gpus
from jobs.run_facts import lines
from jobs.which_run import Wanted, find
from tests.actors.drive import write_job
from tests.train.worlds import seated_engine

pytestmark = pytest.mark.unit

Look = Callable[..., Prepared]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("ground")).parent


@pytest.fixture
def look(ground: Path, tmp_path: Path) -> Look:
    """`concertina train tiny.yaml --run NAME --set ...`, which ends before it starts anything."""
    typed = Wanted(str(ground / "tiny.yaml"), [], None, None, None, str(tmp_path / "runs"))

    def found(run: str, *overrides: str, **changes: object) -> Prepared:
        with ExitStack() as held:
            answer = find(replace(typed, run=run, overrides=list(overrides), **changes), held)  # type: ignore[arg-type]
            assert not isinstance(answer, Prepared)
            assert isinstance(answer, tuple)
            return answer[0]

    return found


def leave_checkpoint(run: RunFolder, step: int) -> Path:
    """Of the run's model, as it is before the first step."""
    engine = seated_engine(run.job(), Layout(1), 0)
    write_part(partial_folder(run.checkpoints, step, 0), engine.state(), rank=0, world=1, generation=0)
    assert commit(run.checkpoints, step, 0, engine.facts() | {"step": step}) is not None
    return checkpoint_folder(run.checkpoints, step)


def start_of(prepared: Prepared) -> str | None:
    written = load_job(prepared.folder.job_file).checkpoint.initial_load_path
    assert written == prepared.job.checkpoint.initial_load_path
    return written


def test_a_name_becomes_the_checkpoint_it_means_now(look: Look) -> None:
    base = look("base")
    assert start_of(base) is None
    left = leave_checkpoint(base.folder, 7)
    for name in ("base", "latest", str(base.folder.path)):
        tuned = look("tuned", f"checkpoint.initial_load_path={name}")
        assert start_of(tuned) == str(left)
        assert (tuned.resume_from, tuned.resume_step) == (None, 0)
        assert f"  started from {left}" in lines(tuned.folder, summarize(tuned.folder), 0)
        shutil.rmtree(tuned.folder.path)


def test_begun_again_it_starts_from_where_it_started(look: Look) -> None:
    base = look("base")
    first = leave_checkpoint(base.folder, 7)
    words = ("tuned", "checkpoint.initial_load_path=base")
    assert start_of(look(*words)) == str(first)
    leave_checkpoint(base.folder, 8)  # the base goes on meanwhile
    assert look(*words).job.checkpoint.initial_load_path == str(first)
    assert look("tuned", job=None).job.checkpoint.initial_load_path == str(first)
    assert look("another", words[1]).job.checkpoint.initial_load_path != str(first)
    shutil.rmtree(first)
    with pytest.raises(NotFoundError, match=r"checkpoint\.initial_load_path: "):
        look(*words)


def test_with_a_checkpoint_of_its_own_it_needs_no_start(look: Look) -> None:
    first = leave_checkpoint(look("base").folder, 7)
    words = ("tuned", "checkpoint.initial_load_path=base")
    own = leave_checkpoint(look(*words).folder, 3)
    shutil.rmtree(first.parent.parent)
    resumed = look(*words)
    assert (resumed.resume_from, resumed.resume_step) == (own, 3)
    assert resumed.job.checkpoint.initial_load_path == str(first), "where it came from is not forgotten"
    plain = leave_checkpoint(look("plain").folder, 3)
    resumed = look("plain", "checkpoint.initial_load_path=/no/such")
    assert resumed.resume_from == plain
    assert resumed.job.checkpoint.initial_load_path is None, "nor is any invented"


def test_a_start_that_does_not_fit_makes_no_run(look: Look, tmp_path: Path) -> None:
    leave_checkpoint(look("base").folder, 7)
    start = "checkpoint.initial_load_path=base"
    with pytest.raises(UserError, match=r"is of another model: .* has shape .* in the checkpoint, and has shape"):
        look("tuned", start, "model.hidden_size=64")
    with pytest.raises(NotFoundError, match="initial_load_path: no run 'bose'"):
        look("tuned", "checkpoint.initial_load_path=bose")
    assert [run.run_id for run in list_runs(tmp_path / "runs")] == ["base"]


def test_text_is_cut_as_the_weights_know_it(look: Look, tmp_path: Path) -> None:
    base = look("base")
    assert base.folder.tokenizer_file.read_bytes() == (base.corpus / "tokenizer.json").read_bytes()
    leave_checkpoint(base.folder, 7)
    start = "checkpoint.initial_load_path=base"
    (tmp_path / "other.txt").write_text("Keys and buttons, bellows and reeds.\n" * 200)
    other = f"data.source={tmp_path}/other.txt"
    remedy = f"data.tokenizer.path={base.folder.tokenizer_file}"
    with pytest.raises(UserError, match="trained with another tokenizer") as caught:
        look("tuned", start, other)
    assert str(caught.value).endswith(remedy.replace("=", " to "))
    assert [run.run_id for run in list_runs(tmp_path / "runs")] == ["base"]
    assert look("tuned", start, other, remedy).job.checkpoint.initial_load_path is not None


def test_a_mixture_is_data_like_any_other(
    look: Look, ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:  # type: ignore[type-arg]
    sources = {"ast": {"source": str(ground / "text" / "ast.txt")}, "bdb": {"source": str(ground / "text" / "bdb.txt")}}
    job = yaml.safe_load((ground / "tiny.yaml").read_text())
    job["data"] = {"sequence_length": 32, "tokenizer": {"vocab_size": 300}, "sources": sources}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(job))
    words = {"job": str(tmp_path / "mixed.yaml")}
    prepared = look("mixed", **words)
    facts = prepared.folder.data_facts()
    assert facts is not None
    assert (facts.name, facts.path) == ("ast 0.5, bdb 0.5", str(prepared.corpus))
    assert prepared.folder.tokenizer_file.is_file()
    assert "warning: source" not in capsys.readouterr().err
    look("often", "training.steps=6000", **words)
    assert "warning: source ast is read " in capsys.readouterr().err
    leave_checkpoint(prepared.folder, 3)
    assert look("mixed", **words).resume_step == 3
    with pytest.raises(DataError, match=f"was trained on corpus {facts.fingerprint}, now it is"):
        look("mixed", "data.sources.ast.weight=2", **words)


def test_stages_are_refused_on_gpus() -> None:
    refuse_stages_on_gpus(Layout(4, tp=2))
    with pytest.raises(UserError, match=r"layout\.pp=2 does not run on GPUs yet.*set layout\.pp to 1, or cluster"):
        refuse_stages_on_gpus(Layout(4, pp=2))
