"""Does each line of a member's log say who speaks, in which seat, and at which step?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.rank_log import open_member_log
from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


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


def seating(layout: Layout, *members: int, spares: tuple[int, ...] = ()) -> Seating:
    return Seating(layout, members, (None,) * layout.world, spares)


def test_prefix_of_a_member_that_changes_its_seat(tmp_path: Path, package: logging.Logger) -> None:
    stamp, log = open_member_log(tmp_path / "logs", 7, step=5), logging.getLogger("concertina.rank")
    log.info("waiting for the others")
    stamp.sit(3, seating(Layout(4, ep=2), 4, 5, 7, 6))
    log.info("step")
    stamp.step = 12
    logging.getLogger("concertina.channel").warning("no coordinator")
    stamp.sit(4, seating(Layout(2, tp=2), 4, 7, spares=(5,)))
    log.info("step")
    stamp.sit(5, seating(Layout(2), 4, 5, spares=(7,)))
    log.info("moving")
    lines = (tmp_path / "logs" / "member-7.log").read_text().splitlines()
    for line, prefix in zip(
        lines,
        [
            f"[member 7 | step 5] {DATE} INFO waiting for the others",
            f"[gen 3 | rank 2 pp0 dp2 ep0 | step 5] {DATE} INFO step",
            f"[gen 3 | rank 2 pp0 dp2 ep0 | step 12] {DATE} WARNING no coordinator",
            f"[gen 4 | rank 1 pp0 dp0 tp1 ep0 | step 12] {DATE} INFO step",
            f"[gen 5 | spare 7 | step 12] {DATE} INFO moving",
        ],
        strict=True,
    ):
        said = re.escape(prefix).replace(re.escape(DATE), DATE)
        assert re.fullmatch(said, line), line


def test_a_resume_appends(tmp_path: Path, package: logging.Logger) -> None:
    for word in ("first", "second"):
        open_member_log(tmp_path, 0, 0)
        logging.getLogger("concertina.rank").info(word)
        handler = package.handlers[-1]
        package.removeHandler(handler)
        handler.close()
    assert [line.rpartition(" ")[2] for line in (tmp_path / "member-0.log").read_text().splitlines()] == [
        "first",
        "second",
    ]
