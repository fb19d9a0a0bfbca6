"""Does one command start a run, go on with it and leave it alone when it is done, and is a second driver refused?"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from concertina.config import load_job
from concertina.errors import CheckpointError, ConfigError, NotFoundError, UserError
from concertina.state.manifest import checkpoint_folder, list_checkpoints, partial_folder
from concertina.track.events import EventLog, EventType
from concertina.track.owner import OwnerLock
from concertina.track.run import RunFolder, list_runs
from concertina.track.status import claim
from jobs.cli import main
from jobs.preparation import Prepared, forget
from jobs.which_run import Done, Wanted, find
from tests.actors.drive import Drive, write_job
from tests.jobs.test_train import keeper_of
from tests.track.a_run import end, start, train

Find = Callable[..., Prepared | Done]

NAME = "night-1"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("ground")).parent


@pytest.fixture
def wanted(ground: Path, tmp_path: Path) -> Wanted:
    """`concertina train tiny.yaml --run night-1`"""
    return Wanted(str(ground / "tiny.yaml"), [], None, NAME, None, str(tmp_path / "runs"))


@pytest.fixture
def look(wanted: Wanted) -> Find:
    """What the command finds, with these words changed. It ends, as after a kill, before it has started anything."""

    def found(**changes: object) -> Prepared | Done:
        with ExitStack() as held:
            answer = find(replace(wanted, **changes), held)  # type: ignore[arg-type]
            return answer if isinstance(answer, Done) else answer[0]

    return found


def write_session(run: RunFolder, last: int, resumed: int | None = None, state: str = "") -> None:
    with EventLog(run.events_file, run.run_id) as log:
        start(log, resumed)
        train(log, (resumed or 0) + 1, last, checkpoint_every=1000)
        if state:
            end(log, state)


@pytest.mark.unit
def test_the_first_time_it_is_a_new_run_of_that_name(look: Find) -> None:
    found = look()
    assert isinstance(found, Prepared)
    assert (found.folder.run_id, found.resume_from, found.resume_step, found.generation) == (NAME, None, 0, 0)
    assert [run.run_id for run in list_runs(found.folder.storage)] == [NAME]
    assert sorted(path.name for path in found.folder.storage.iterdir()) == ["data", NAME]
    assert load_job(found.folder.job_file) == found.job
    forget(found)
    assert list_runs(found.folder.storage) == []


@pytest.mark.unit
@pytest.mark.parametrize("state", ["", "stopped", "failed", "killed"])
def test_without_a_checkpoint_it_begins_again(look: Find, state: str) -> None:
    first = look()
    assert isinstance(first, Prepared)
    write_session(first.folder, 7, state=state)
    again = look(job=None) if state else look()
    assert isinstance(again, Prepared)
    assert (again.folder, again.resume_from, again.resume_step) == (first.folder, None, 0)
    assert again.generation > first.generation
    assert again.job == first.job
    forget(again)
    assert first.folder.events_file.exists(), "what has happened is not forgotten"


@pytest.mark.unit
def test_killed_before_anything_has_happened_it_begins_too(look: Find) -> None:
    first, again = look(), look()
    assert isinstance(first, Prepared)
    assert isinstance(again, Prepared)
    assert again.folder == first.folder


@pytest.mark.unit
def test_finished_it_is_done_unless_more_is_wanted(look: Find) -> None:
    first = look()
    assert isinstance(first, Prepared)
    write_session(first.folder, 60, state="finished")
    shutil.rmtree(first.folder.storage / "data")
    done = look()
    assert isinstance(done, Done)
    assert done.text == f"run {NAME} has finished 60 of 60 steps: nothing is left to do"
    assert not (first.folder.storage / "data").exists(), "nothing was prepared"
    assert isinstance(look(overrides=["training.steps=61"]), Prepared)
    assert isinstance(look(overrides=["training.steps=59"]), Done)


@pytest.mark.unit
def test_stopped_or_failed_at_its_last_step_is_not_finished(look: Find) -> None:
    first = look()
    assert isinstance(first, Prepared)
    write_session(first.folder, 60, state="failed")
    assert isinstance(look(), Prepared)


@pytest.mark.unit
def test_damaged_checkpoints_are_not_begun_over(look: Find) -> None:
    first = look()
    assert isinstance(first, Prepared)
    broken = checkpoint_folder(first.folder.checkpoints, 20)
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints"):
        look()


@pytest.mark.unit
def test_a_checkpoint_without_its_manifest_is_not_begun_over(look: Find) -> None:
    """Beginning again removes what is there. One that never was complete is no loss."""
    first = look()
    assert isinstance(first, Prepared)
    partial_folder(first.folder.checkpoints, 10, 0).mkdir()
    assert isinstance(look(), Prepared)
    checkpoint_folder(first.folder.checkpoints, 20).mkdir()
    with pytest.raises(CheckpointError, match="step-00000020 has lost its manifest"):
        look()


@pytest.mark.unit
def test_a_run_that_is_given_up_while_its_lock_is_waited_for_is_not_there(look: Find) -> None:
    first = look()
    assert isinstance(first, Prepared)
    folder = first.folder
    holder = OwnerLock(folder.driver_lock)

    def give_up() -> None:
        shutil.rmtree(folder.path)
        holder.release()

    soon = threading.Timer(0.3, give_up)
    soon.start()
    with pytest.raises(NotFoundError, match="has just been given up"):
        claim(folder)
    soon.join()


@pytest.mark.unit
def test_a_run_another_command_is_about_to_run_is_refused(look: Find) -> None:
    """It has no events yet: its cluster starts."""
    first = look()
    assert isinstance(first, Prepared)
    with OwnerLock(first.folder.driver_lock), pytest.raises(UserError, match=f"{NAME} is still being run by process "):
        look()
    with OwnerLock(first.folder.driver_lock), pytest.raises(UserError, match="is still being run"):
        look(run=None, job=None, resume=NAME)
    with EventLog(first.folder.events_file, NAME) as log:
        start(log)
        with pytest.raises(UserError, match="is still being run"):
            look()
    assert isinstance(look(), Prepared)


@pytest.mark.unit
def test_it_keeps_others_out_until_it_ends(wanted: Wanted, look: Find) -> None:
    with ExitStack() as held:
        find(wanted, held)
        with pytest.raises(UserError, match="is still being run"):
            look()
    assert isinstance(look(), Prepared)


@pytest.mark.unit
def test_another_job_of_that_name_is_refused(look: Find) -> None:
    look()
    with pytest.raises(UserError, match=f"run {NAME} is of job 'tiny', not of 'other': choose another name"):
        look(overrides=["name=other"])


@pytest.mark.unit
def test_resume_wants_a_checkpoint_and_names_the_way_to_begin_again(look: Find) -> None:
    look()
    with pytest.raises(NotFoundError, match=f"no checkpoint to resume from.*--run {NAME}"):
        look(run=None, resume=NAME)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["", "Night", "../runs", "a/b", "-a", "a.", ".a", "a" * 64, "a\n", "latest", "data"])
def test_what_is_no_name_is_refused_and_makes_nothing(look: Find, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        look(run=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.unit
def test_a_name_without_a_run_or_a_job_and_two_names_are_refused(look: Find) -> None:
    with pytest.raises(ConfigError, match="no job file to start it with"):
        look(job=None)
    with pytest.raises(ConfigError, match="give one of them"):
        look(resume="latest")


@pytest.mark.unit
def test_a_folder_that_is_no_run_is_left_alone(look: Find, tmp_path: Path) -> None:
    mine = tmp_path / "runs" / NAME / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(UserError, match="is there already, and is no run"):
        look()
    assert mine.is_dir()
    assert list_runs(tmp_path / "runs") == []
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]


@pytest.mark.unit
def test_done_is_told_with_the_summary_and_is_no_error(
    look: Find, wanted: Wanted, capsys: pytest.CaptureFixture[str]
) -> None:
    first = look()
    assert isinstance(first, Prepared)
    write_session(first.folder, 60, state="finished")
    capsys.readouterr()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(SystemExit) as left:
        main(["train", str(wanted.job), "--run", NAME, "--storage", str(wanted.storage), "-o", "json"])
    said = capsys.readouterr()
    assert not left.value.code
    assert said.err.strip() == f"run {NAME} has finished 60 of 60 steps: nothing is left to do"
    assert '"status": "finished"' in said.out
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


# -- on a cluster of its own that dies ---------------------------------------------------------------------------------

STEPS, EVERY = 400, 200
CHANGES = (f"training.steps={STEPS}", "training.eval_every_steps=200", f"checkpoint.every_steps={EVERY}")
WORDS = ("--run", NAME, *(word for change in CHANGES for word in ("--set", change)))


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_same_command_goes_on_after_its_cluster_has_died(ground: Path, tmp_path: Path) -> None:
    """Before there is a checkpoint, with one, and when all is done."""
    drives: list[Drive] = []

    def command() -> Drive:
        drives.append(Drive(tmp_path / f"{len(drives)}", [str(ground / "tiny.yaml"), *WORDS], tmp_path / "runs"))
        return drives[-1]

    try:
        early = command()
        early.reaches(1)
        _lose_the_cluster(early)
        assert 0 < len(early.steps()) < EVERY
        assert list_checkpoints(early.run.checkpoints) == []

        begun = command()
        begun.said(f"resuming run {NAME} from the beginning: it has no checkpoint yet")
        begun.wait(lambda: begun.events(EventType.CHECKPOINT))
        _lose_the_cluster(begun)
        before = begun.steps()
        assert EVERY <= len(before) < STEPS

        last = command()
        assert last.ends(300) == 0, last.err
        assert last.lines[0] == f"resuming run {NAME} after step {EVERY}"
        steps = last.steps()  # fails for one that is there twice, or missing
        assert len(steps) == STEPS
        assert before.items() <= steps.items(), "those done again are the same to the last bit"
        assert [event.data["resumed_from_step"] for event in last.events(EventType.START)] == [None, 0, EVERY]
        assert len({event.generation for event in last.events(EventType.STEP)}) == 3

        done = command()
        assert done.ends() == 0, done.err
        assert done.lines == [f"run {NAME} has finished {STEPS} of {STEPS} steps: nothing is left to do"]
        assert done.steps() == steps
    finally:
        for drive in drives:
            drive.clean_up()


def _lose_the_cluster(drive: Drive) -> None:
    """Its keeper is killed, and all of Ray, head and ranks, with it; the driver is ended as by a scheduler."""
    journal = drive.journal()
    processes = [psutil.Process(pid) for pid in (journal["coordinator_pid"], *journal["pids"].values())]
    keeper_of(drive).kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    drive.process.kill()
    drive.process.wait()
