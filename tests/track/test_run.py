"""Is a run's folder complete, found by any fair name, and refused with near names otherwise?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from concertina.config.schema import Job
from concertina.errors import ConcertinaError, NotFoundError
from concertina.track.run import DataFacts, RunFolder, create_run, list_runs, open_run

pytestmark = pytest.mark.unit

FACTS = DataFacts(name="stdlib", fingerprint="0123456789abcdef", num_tokens=1000, path="/data/0123")


@pytest.fixture
def job() -> Job:
    return Job(name="quick")


@pytest.fixture
def three(tmp_path: Path, job: Job) -> list[RunFolder]:
    return [create_run(tmp_path, Job(name=name)) for name in ("quick", "quick", "slow")]


def test_a_new_run_holds_what_is_needed_to_repeat_it(tmp_path: Path, job: Job) -> None:
    run = create_run(tmp_path / "runs", job, FACTS)
    assert run.run_id.startswith("quick-")
    assert len(run.run_id) == len("quick-") + 8
    assert Job.model_validate(run.job_document()) == job
    assert run.data_facts() == FACTS
    found = run.versions()
    assert found["python"].startswith("3.")
    assert {"concertina", "torch", "ray", "mlflow", "hostname", "git", "created_ns"} <= set(found)
    assert run.checkpoints.is_dir()
    assert run.logs.is_dir()
    assert not [name for name in os.listdir(run.path) if name.endswith(".tmp")]


def test_small_and_large_numbers_survive_the_yaml(tmp_path: Path) -> None:
    job = Job.model_validate({"name": "n", "training": {"min_learning_rate": 1e-05, "adam_epsilon": 1e-16}})
    run = create_run(tmp_path, job)
    training = yaml.safe_load(run.job_file.read_text())["training"]
    assert (training["min_learning_rate"], training["adam_epsilon"]) == (1e-05, 1e-16)


def test_runs_are_found_by_id_prefix_path_and_latest(tmp_path: Path, three: list[RunFolder]) -> None:
    first, _, slow = three
    assert open_run(tmp_path, first.run_id) == first
    assert open_run(tmp_path, "slow") == slow
    assert open_run(tmp_path, first.run_id[:-1]) == first
    assert open_run(tmp_path, str(first.path) + "/") == first
    assert open_run(tmp_path, "latest") == slow
    assert [run.run_id for run in list_runs(tmp_path)] == [run.run_id for run in reversed(three)]


def test_a_name_that_fits_several_is_refused_with_all_of_them(tmp_path: Path, three: list[RunFolder]) -> None:
    with pytest.raises(NotFoundError, match="fits 2 runs") as caught:
        open_run(tmp_path, "quick")
    assert all(run.run_id in str(caught.value) for run in three[:2])
    assert caught.value.exit_code == 102


def test_an_unknown_name_gets_near_ones(tmp_path: Path, three: list[RunFolder]) -> None:
    with pytest.raises(NotFoundError, match=f"did you mean .*{three[0].run_id}"):
        open_run(tmp_path, "qiuck-" + three[0].run_id[-8:])
    with pytest.raises(NotFoundError, match="newest: slow-"):
        open_run(tmp_path, "zzz")
    with pytest.raises(NotFoundError, match="no run"):
        open_run(tmp_path, "")


def test_a_way_out_of_the_storage_is_not_a_run(tmp_path: Path, job: Job) -> None:
    create_run(tmp_path / "other", job)
    create_run(tmp_path / "runs", job)
    outside = list_runs(tmp_path / "other")[0].run_id
    with pytest.raises(NotFoundError):
        open_run(tmp_path / "runs", f"../other/{outside}")


def test_no_runs_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="concertina train"):
        open_run(tmp_path / "none", "latest")
    (tmp_path / "data").mkdir()
    assert list_runs(tmp_path) == []


def test_a_storage_that_cannot_be_made_is_one_line(tmp_path: Path, job: Job) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConcertinaError, match="set storage_path"):
        create_run(tmp_path / "file" / "runs", job)


def test_a_folder_whose_making_was_killed_is_no_run(tmp_path: Path, job: Job) -> None:
    run = create_run(tmp_path, job)
    run.job_file.unlink()
    assert list_runs(tmp_path) == []


def test_broken_facts_do_not_hide_a_run(tmp_path: Path, job: Job) -> None:
    run = create_run(tmp_path, job, FACTS)
    run.versions_file.write_text("{")
    run.data_file.unlink()
    assert open_run(tmp_path, "latest").versions() == {}
    assert run.data_facts() is None


def test_the_commit_is_only_that_of_a_checkout_that_tracks_us() -> None:
    """Run from a copy inside a repository that does not know it, as a virtual environment's is."""
    code = "from concertina.track.versions import versions; print(versions()['git'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tracked = subprocess.run(
        ["git", "ls-files", "--error-unmatch", "platform/concertina/__init__.py"], capture_output=True, check=False
    )
    assert ("commit" in done.stdout) == (tracked.returncode == 0)


def test_imports_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys; import concertina.track, concertina.track.owner, concertina.track.versions\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
