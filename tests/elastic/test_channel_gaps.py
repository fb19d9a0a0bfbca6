"""Does the histogram say how long gaps were, and does the server count a member's as it hears it?"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.channel import ChannelClient, ChannelServer, Gaps
from concertina.elastic.channel.gaps import GapsByMember
from tests.waiting import wait_until

pytestmark = pytest.mark.unit

SECONDS = st.floats(0.0, 200.0)


def gaps_of(*seconds: float) -> Gaps:
    gaps = Gaps()
    for each in seconds:
        gaps.add(each)
    return gaps


@given(st.lists(SECONDS, min_size=1), st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_a_quantile_is_never_too_short_and_a_twelfth_too_long_at_most(seconds: list[float], share: float) -> None:
    exact = sorted(seconds)[max(0, -int(-share * len(seconds) // 1) - 1)]
    found = gaps_of(*seconds).quantile(share)
    assert exact <= found * (1 + 1e-9)
    assert found <= max(0.0011, exact * 1.0906)


def test_the_longest_is_kept_to_the_digit_also_beyond_the_last_bucket() -> None:
    gaps = gaps_of(0.2, 3600.5, 0.3)
    assert gaps.longest_s == 3600.5
    assert gaps.quantile(0.5) == pytest.approx(0.3, rel=0.09)
    assert len(gaps) == 3


def test_nothing_counted_is_no_gap() -> None:
    assert (len(Gaps()), Gaps().quantile(0.99), Gaps().longest_s) == (0, 0.0, 0.0)


@given(st.lists(SECONDS), st.lists(SECONDS))
def test_two_put_together_are_one_that_counted_all(one: list[float], other: list[float]) -> None:
    both = Gaps.together([gaps_of(*one), gaps_of(*other)])
    assert both.to_json() == gaps_of(*one, *other).to_json()


@given(st.lists(SECONDS))
def test_it_comes_back_from_json(seconds: list[float]) -> None:
    document = json.loads(json.dumps(gaps_of(*seconds).to_json()))
    assert Gaps.from_json(document).to_json() == document
    assert len(Gaps.from_json(document)) == len(seconds)


def test_members_are_counted_apart_and_so_are_those_that_train() -> None:
    members = GapsByMember()
    for member, training, seconds in ((1, True, 0.2), (1, False, 5.0), (10, True, 0.3), (1, True, 0.2)):
        members.add(member, training, seconds)
    document = members.to_json()
    assert {name: list(of) for name, of in document.items()} == {"training": ["1", "10"], "busy": ["1"]}
    assert len(Gaps.from_json(document["training"]["1"])) == 2
    assert document["busy"]["1"]["longest_s"] == 5.0


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    made = ChannelServer("127.0.0.1", "token", lambda member, said: None, lambda member, evidence: None)
    yield made
    made.close()


def test_beats_are_counted_by_the_phase_they_were_last_heard_in(server: ChannelServer) -> None:
    """The gap in which a member begins to train was judged as one of before."""
    client = ChannelClient(server.address, "token", member=3, beat_s=0.01)
    client.progress(0, "imports")
    client.start(lambda document: None)
    wait_until(lambda: 3 in server.gaps.busy and len(server.gaps.busy[3]) > 5)
    assert server.gaps.training == {}
    client.progress(1, "step")
    wait_until(lambda: 3 in server.gaps.training and len(server.gaps.training[3]) > 5)
    before = len(server.gaps.busy[3])
    wait_until(lambda: len(server.gaps.training[3]) > 15)
    assert len(server.gaps.busy[3]) == before
    client.close()


def test_messages_are_no_beats_and_a_new_connection_begins_anew(server: ChannelServer) -> None:
    """What is between two connections is no gap: another rule judges who is not connected."""
    client = ChannelClient(server.address, "token", member=0, beat_s=1000.0)
    client.start(lambda document: None)
    client.send({"a": "message"})
    wait_until(lambda: server.received)
    client.move_to(server.address)
    client.send({"another": "message"})
    wait_until(lambda: list(server.received.values()) == [2])
    assert (server.gaps.training, server.gaps.busy) == ({}, {})
    client.close()
