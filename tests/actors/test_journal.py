"""Does a restarted coordinator find its members and generations again, and nobody else's?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from actors.journal import Journal
from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit

OLD = Seating(Layout(3, ep=3), (0, 1, 11), (1, 2, 0))
NEW = Seating(Layout(2, ep=2), (0, 11), (1, 0), spares=(12,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.json"


def written(path: Path) -> Journal:
    """Of a session in which a generation is under way."""
    journal = Journal.open(path, "first")
    journal.pids, journal.nodes = {0: 4711, 11: 4712}, {0: "node-a", 11: "node-b"}
    journal.seatings, journal.last_generation, journal.next_member = {4: OLD, 6: NEW}, 6, 13
    journal.write()
    return journal


def test_a_session_begins_with_an_empty_journal(path: Path) -> None:
    journal = Journal.open(path, "first")
    assert (journal.pids, journal.nodes, journal.seatings) == ({}, {}, {})
    assert (journal.last_generation, journal.next_member) == (-1, 0)


def test_a_restart_finds_members_and_generations(path: Path) -> None:
    assert Journal.open(path, "first") == Journal(path, "first")
    journal = written(path)
    assert Journal.open(path, "first") == journal
    assert Journal.open(path, "first").seatings == {4: OLD, 6: NEW}


def test_numbers_are_never_given_twice(path: Path) -> None:
    """Also those of members and generations that are gone when the coordinator is."""
    written(path)
    journal = Journal.open(path, "first")
    assert journal.next_member > max(journal.pids)
    assert journal.last_generation >= max(journal.seatings)
    given = [journal.give_number(), journal.give_number()]
    assert Journal.open(path, "first").give_number() == given[-1] + 1, "also when nothing else was written since"
    assert len({*given, *journal.pids}) == 4


def test_what_is_written_replaces_what_was(path: Path) -> None:
    journal = written(path)
    journal.pids, journal.seatings = {1: 2}, {7: NEW}
    assert Journal.open(path, "first").pids == {0: 4711, 11: 4712}, "not before it is written"
    journal.write()
    found = Journal.open(path, "first")
    assert (found.pids, found.seatings) == ({1: 2}, {7: NEW})


def test_who_is_lost_is_looked_for_no_more(path: Path) -> None:
    journal = written(path)
    journal.forget(11)
    journal.forget(99)
    journal.write()
    found = Journal.open(path, "first")
    assert (found.pids, found.nodes) == ({0: 4711}, {0: "node-a"})
    assert found.seatings == {4: OLD, 6: NEW}, "generations remember it: others may have its state"


def test_it_says_who_wrote_it(path: Path) -> None:
    written(path)
    assert json.loads(path.read_text())["coordinator_pid"] == os.getpid()


def test_another_sessions_members_are_not_ours(path: Path) -> None:
    written(path)
    journal = Journal.open(path, "second")
    assert journal == Journal(path, "second")
    journal.write()
    assert Journal.open(path, "first") == Journal(path, "first")


@pytest.mark.parametrize("content", ["", '{"session": "first", "pi', "{}"])
def test_a_file_that_says_nothing_is_no_journal(path: Path, content: str) -> None:
    path.write_text(content)
    assert Journal.open(path, "first") == Journal(path, "first")


def test_the_end_of_a_session_leaves_no_file(path: Path) -> None:
    journal = written(path)
    assert json.loads(path.read_text())["session"] == "first"
    journal.remove()
    journal.remove()
    assert list(path.parent.iterdir()) == []
