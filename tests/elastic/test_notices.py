"""When does a run leave a node that will go? (`Notices`)"""

from __future__ import annotations

import pytest

from concertina.elastic.notices import GATHER_S, RELEASE_S, RESERVE_S, Notice, NoticeNews, Notices, Source

pytestmark = pytest.mark.unit
AWS, AZURE, RAY = frozenset({Source.AWS}), frozenset({Source.AZURE}), frozenset({Source.RAY})


def said(source: Source = Source.AWS, left_s: float = 30.0, *, is_hint: bool = False) -> Notice:
    return Notice(source, left_s, "terminate", is_hint)


def lines(news: list[NoticeNews]) -> list[str]:
    """As people read them, and as events carry them."""
    assert [NoticeNews.from_json(one.to_json()) for one in news] == news
    return [str(one) for one in news]


def first(notices: Notices, nodes: list[str], decide: str, since: float, until: float) -> float:
    """The first tenth of a second at which a decision is made."""
    for tenth in range(round(since * 10), round(until * 10) + 1):
        if getattr(notices, decide)(nodes, tenth / 10):
            return tenth / 10
    return float("inf")


def test_a_notice_travels_as_json() -> None:
    assert Notice.from_json(said().to_json()) == said()


def test_who_is_noticed_leaves_when_no_other_notice_has_come_for_a_while() -> None:
    notices = Notices()
    assert lines(notices.hear("a", AWS, [said()], 0.0)) == ["is taken back in 30 s (aws: terminate)"]
    assert notices.doomed == notices.avoided == {"a"}
    assert first(notices, ["a"], "is_time_to_leave", 0, 30) == GATHER_S


def test_notices_five_seconds_apart_become_one_change() -> None:
    notices = Notices()
    notices.hear("a", AWS, [said()], 0.0)
    notices.hear("b", AWS, [said()], 5.0)
    assert 5.0 < first(notices, ["a", "b"], "is_time_to_leave", 0, 30) < 5.0 + GATHER_S


def test_a_stream_of_notices_keeps_nobody_beyond_a_third_of_the_lead() -> None:
    """A node may go at half its time."""
    notices = Notices()
    for second in range(0, 30, 3):
        notices.hear(f"n{second}", AWS, [said()], float(second))
        if notices.is_time_to_leave(sorted(notices.doomed), second):
            break
    assert second < 15


def test_the_same_notice_said_again_is_no_news_and_does_not_put_it_off() -> None:
    notices = Notices()
    notices.hear("a", AWS, [said()], 0.0)
    assert notices.hear("a", AWS, [said(left_s=26.0)], 4.0) == []
    assert notices.deadline_s("a") == 30.0
    assert notices.is_time_to_leave(["a"], GATHER_S)


def test_a_notice_that_is_taken_back_in_time_costs_nothing() -> None:
    notices = Notices()
    notices.hear("a", AZURE, [said(Source.AZURE)], 0.0)
    assert lines(notices.hear("a", AZURE, [], 4.0)) == ["azure takes its notice back"]
    assert not notices.doomed
    assert not notices.avoided
    assert first(notices, ["a"], "is_time_to_leave", 0, 60) == float("inf")


def test_one_source_that_is_silent_takes_back_nothing_of_another() -> None:
    notices = Notices()
    notices.hear("a", AWS, [said()], 0.0)
    notices.hear("a", RAY, [], 1.0)
    assert notices.doomed == {"a"}


def test_a_hint_keeps_newcomers_away_and_sends_nobody() -> None:
    notices = Notices()
    hint = notices.hear("a", AWS, [said(is_hint=True)], 0.0)
    assert lines(hint) == ["may be taken back soon (aws: terminate)"]
    assert not notices.doomed
    assert notices.avoided == {"a"}
    assert notices.deadline_s("a") is None
    assert not notices.is_time_to_leave(["a"], 60.0)
    both = [said(is_hint=True), said(left_s=120.0)]
    assert lines(notices.hear("a", AWS, both, 60.0)) == ["is taken back in 120 s (aws: terminate)"]
    assert first(notices, ["a"], "is_time_to_leave", 60, 180) == 60 + GATHER_S


def test_a_run_with_nowhere_to_go_stops_in_time_to_write() -> None:
    notices = Notices()
    notices.hear("a", AWS, [said(left_s=30.0)], 0.0)
    assert first(notices, ["a"], "is_last_call", 0, 30) == 30.0 - RESERVE_S
    notices.hear("b", AWS, [said(left_s=9.0)], 100.0)
    assert first(notices, ["b"], "is_last_call", 100, 109) == 103.0  # not before a third is over


@pytest.mark.parametrize(("source", "at"), [(Source.AWS, 0.0), (Source.AZURE, 30.0 - RELEASE_S)])
def test_a_node_is_given_back_at_once_unless_its_notice_may_be_taken_back(source: Source, at: float) -> None:
    notices = Notices()
    notices.hear("a", {source}, [said(source)], 0.0)
    assert notices.is_given_back("a", at)
    assert not notices.is_given_back("a", at - 0.1) or at == 0.0
    assert not notices.is_given_back("b", 100.0)


def test_the_earliest_of_two_sources_counts() -> None:
    notices = Notices()
    notices.hear("a", AZURE, [said(Source.AZURE, 60.0)], 0.0)
    notices.hear("a", RAY, [said(Source.RAY, 30.0)], 10.0)
    assert notices.deadline_s("a") == 40.0
    assert notices.is_given_back("a", 10.0), "Ray takes nothing back"
