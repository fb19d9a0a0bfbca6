"""Does a job that was written down load back equal, and does its digest see every change?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.config import Job, digest, dump_job, load_job

pytestmark = pytest.mark.unit

overrides = st.fixed_dictionaries(
    {},
    optional={
        "storage_path": st.sampled_from(["runs", "1e-4", "no", "~", "12:30", "a b", "'", "é"]),
        "data": st.builds(lambda source: {"source": source}, st.lists(st.sampled_from(["010", "x", "on"]), min_size=1)),
        "training": st.fixed_dictionaries(
            {"learning_rate": st.floats(1e-3, 1e6), "micro_batch_size": st.none() | st.integers(1, 99)}
        ),
    },
)


@given(overrides)
def test_a_dumped_job_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any]) -> None:
    job = Job(name="a", **keys)
    path = tmp_path_factory.mktemp("jobs") / "a.yaml"
    path.write_text(dump_job(job), encoding="utf-8")
    assert load_job(path) == job
    assert digest(load_job(path)) == digest(job)


def test_every_job_file_survives(tmp_path: Path) -> None:
    for file in Path("jobs").glob("*.yaml"):
        job = load_job(file)
        (tmp_path / file.name).write_text(dump_job(job))
        assert load_job(tmp_path / file.name) == job


def test_the_digest_sees_a_change() -> None:
    job = Job(name="a")
    assert digest(job) == digest(Job.model_validate(job.model_dump()))
    assert len(digest(job)) == 16
    changed = job.model_copy(update={"training": job.training.model_copy(update={"seed": 1})})
    assert digest(changed) != digest(job)
