"""Is every job file in jobs/ right, does it fit its cluster, and does its first line say what it is?"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.opening import open_job
from tests.house.tree import ROOT, files

pytestmark = pytest.mark.unit

JOB_FILES = [path for path in files() if path.parent == Path("jobs") and path.suffix == ".yaml"]


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_job_file(path: Path) -> None:
    opened = open_job(str(ROOT / path))
    assert opened.job.name == path.stem
    assert opened.layout.world == opened.job.cluster.num_workers
    assert (ROOT / path).read_text().startswith("# ")


def test_the_promised_ones_are_there() -> None:
    promised = {"quickstart", "mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "olmoe-1b-7b", "qwen2-57b-a14b"}
    assert promised <= {path.stem for path in JOB_FILES}
