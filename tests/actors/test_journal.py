"""Does a restarted coordinator find its ranks again, and nobody else's?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.journal import Journal

pytestmark = pytest.mark.unit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.json"


def test_a_session_begins_with_an_empty_journal(path: Path) -> None:
    journal = Journal.open(path, "first")
    assert (journal.pids, journal.nodes, journal.is_restart) == ({}, {}, False)


def test_a_restart_finds_its_ranks(path: Path) -> None:
    Journal.open(path, "first").write({0: 4711, 11: 4712}, {0: "node-a", 11: "node-b"})
    journal = Journal.open(path, "first")
    assert journal.is_restart
    assert journal.pids == {0: 4711, 11: 4712}
    assert journal.nodes == {0: "node-a", 11: "node-b"}


def test_a_restart_before_any_rank_was_placed_is_one(path: Path) -> None:
    Journal.open(path, "first").write({}, {})
    journal = Journal.open(path, "first")
    assert (journal.is_restart, journal.pids) == (True, {})


def test_what_is_written_is_known_at_once_and_replaces_what_was(path: Path) -> None:
    journal = Journal.open(path, "first")
    journal.write({0: 1}, {0: "a"})
    journal.write({1: 2}, {1: "b"})
    assert (journal.pids, journal.nodes) == ({1: 2}, {1: "b"})
    assert Journal.open(path, "first").pids == {1: 2}


def test_another_sessions_ranks_are_not_ours(path: Path) -> None:
    Journal.open(path, "first").write({0: 4711}, {0: "node-a"})
    journal = Journal.open(path, "second")
    assert (journal.pids, journal.is_restart) == ({}, False)
    journal.write({0: 1}, {0: "node-b"})
    assert not Journal.open(path, "first").is_restart


@pytest.mark.parametrize("content", ["", '{"session": "first", "pi', "{}"])
def test_a_file_that_says_nothing_is_no_journal(path: Path, content: str) -> None:
    path.write_text(content)
    assert not Journal.open(path, "first").is_restart


def test_the_end_of_a_session_leaves_no_file(path: Path) -> None:
    journal = Journal.open(path, "first")
    journal.write({0: 1}, {0: "a"})
    assert json.loads(path.read_text())["session"] == "first"
    journal.remove()
    journal.remove()
    assert list(path.parent.iterdir()) == []
