"""Is a notice told once, and again to who may have missed it, whatever the metadata service does? (`Lookout`)"""

from __future__ import annotations

from typing import Any

import pytest

from actors import lookout as module
from actors.lookout import Lookout
from concertina.elastic.notices import Notice, Source
from infra.metadata import NoAnswer
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


class FakeSource:
    """Says what it is told to, or fails."""

    def __init__(self, source: Source = Source.AZURE) -> None:
        self.source = source
        self.found: list[Notice] = []
        self.failure: Exception | None = None
        self.polls = 0

    def poll(self) -> list[Notice]:
        self.polls += 1
        if self.failure is not None:
            raise self.failure
        return self.found


class Ear:
    """Hears, or does not."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[Source], list[Notice]]] = []
        self.deaf = False

    def __call__(self, sources: list[Source], found: list[Notice]) -> bool:
        if not self.deaf:
            self.heard.append((sources, found))
        return not self.deaf


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread: tests look by themselves."""
    monkeypatch.setattr(Lookout, "_begin", lambda self: None)


NOTICE = Notice(Source.AZURE, 30.0, "preempt")


@pytest.mark.usefixtures("still")
def test_what_is_new_is_told_at_once_and_said_again_now_and_then() -> None:
    source, ear = FakeSource(), Ear()
    lookout = Lookout([source], ear)
    lookout.look(100.0)
    assert ear.heard == [], "no notice, no news"
    source.found = [NOTICE]
    lookout.look(101.0)
    lookout.look(102.0)
    assert ear.heard == [([Source.AZURE], [NOTICE])]
    lookout.look(107.0)
    assert len(ear.heard) == 2, "to a coordinator that has restarted"
    source.found = []
    lookout.look(108.0)
    assert ear.heard[-1] == ([Source.AZURE], [])
    lookout.look(114.0)
    assert ear.heard[-2:] == [([Source.AZURE], [])] * 2, "that it is taken back too"
    told = len(ear.heard)
    lookout.look(300.0)
    assert len(ear.heard) == told


@pytest.mark.usefixtures("still")
def test_who_was_not_there_is_told_the_next_time() -> None:
    source, ear = FakeSource(), Ear()
    source.found, ear.deaf = [NOTICE], True
    lookout = Lookout([source], ear)
    lookout.look(100.0)
    ear.deaf = False
    lookout.look(101.0)
    assert ear.heard == [([Source.AZURE], [NOTICE])]


@pytest.mark.usefixtures("still")
def test_no_answer_takes_nothing_back() -> None:
    source, ear = FakeSource(), Ear()
    source.found = [NOTICE]
    lookout = Lookout([source], ear)
    lookout.look(100.0)
    source.failure = NoAnswer("500")
    lookout.look(101.0)
    assert len(ear.heard) == 1


@pytest.mark.usefixtures("still")
def test_a_pretended_source_hides_the_real_one_until_it_is_looked_away_from() -> None:
    real, fake, ear = FakeSource(), FakeSource(), Ear()
    lookout = Lookout([real], ear)
    lookout.look_at(fake)
    fake.found = [NOTICE]
    lookout.look(100.0)
    assert ear.heard == [([Source.AZURE], [NOTICE])]
    fake.found = []
    lookout.look(101.0)
    lookout.look_away(Source.AZURE)
    real.found = [Notice(Source.AZURE, 60.0, "terminate")]
    lookout.look(102.0)
    assert ear.heard[-1] == ([Source.AZURE], real.found)


def test_nothing_that_a_source_or_a_listener_raises_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    source, failures = FakeSource(), [RuntimeError("the control store is away"), None]
    heard: list[Any] = []

    def tell(sources: list[Source], found: list[Notice]) -> bool:
        failure = failures.pop(0) if failures else None
        if failure is not None:
            raise failure
        heard.append(found)
        return True

    source.found = [NOTICE]
    Lookout([source], tell)
    wait_until(lambda: heard)
    source.failure, polls = KeyError("nobody thought of that"), source.polls
    wait_until(lambda: source.polls > polls + 2)
    source.failure, source.found = None, []
    wait_until(lambda: heard[-1] == [])
