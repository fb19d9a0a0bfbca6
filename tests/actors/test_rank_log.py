"""Does each line of a rank's log say who speaks, and at which step?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.assignment import Assignment, RunPlan
from actors.rank_log import open_rank_log
from concertina.config import Job
from concertina.layout import Layout

pytestmark = pytest.mark.unit


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    """The package's logger, as it was before when the test is over."""
    found = logging.getLogger("concertina")
    handlers, level = list(found.handlers), found.level
    yield found
    for handler in set(found.handlers) - set(handlers):
        found.removeHandler(handler)
        handler.close()
    found.setLevel(level)


def test_prefix(tmp_path: Path, package: logging.Logger) -> None:
    job = Job(name="a")
    plan = RunPlan("a-1", tmp_path, tmp_path, job, Layout.of(4, ep=2), "cpu", "session", "token", resume_step=7)
    stamp = open_rank_log(Assignment(plan, generation=3, rank=2, channel=("127.0.0.1", 1)))
    logging.getLogger("concertina.rank").info("forming")
    stamp.step = 12
    logging.getLogger("concertina.channel").warning("no coordinator")
    lines = (tmp_path / "logs" / "rank-2.log").read_text().splitlines()
    assert re.fullmatch(r"\[gen 3 \| rank 2 pp0 dp2 ep0 \| step 7\] .* INFO forming", lines[0])
    assert re.fullmatch(r"\[gen 3 \| rank 2 pp0 dp2 ep0 \| step 12\] .* WARNING no coordinator", lines[1])
