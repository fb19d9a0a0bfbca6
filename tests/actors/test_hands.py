"""Does the coordinator know what it has in its hands? Without Ray: what its books say, and how it asks agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.assignment import RunPlan
from actors.hands import Hands, Member, Reservation
from concertina.config import Job
from concertina.layout import Layout

pytestmark = pytest.mark.unit


@pytest.fixture
def hands() -> Hands:
    """Member 1 on node a, with a standby beside it and an agent."""
    job = Job.model_validate({"name": "a"})
    plan = RunPlan("a-1", Path(), Path(), job, Layout(1), "cpu", "session", "token")
    made = Hands(plan, ("127.0.0.1", 1), 8)
    made.members = {1: Member(1, "a", None, 11)}
    made.standbys = {7: Member(7, "a", None, 77)}
    agent: Any = object()
    made.agents = {"a": agent}
    made.reservations = [Reservation("room", "a", agent, 1, None, {1}, is_ready=True)]
    return made


def test_a_standby_takes_the_room_of_the_member_beside_it(hands: Hands) -> None:
    heir = hands.promote(1)
    assert heir is not None
    assert heir.number == 7
    assert hands.members[7] is heir
    assert hands.standbys == {}
    assert hands.reservations[0].held == {7}


def test_nobody_is_promoted_on_a_node_whose_agent_is_gone(hands: Hands) -> None:
    """It would have a seat and be no member: nobody would miss it."""
    hands.agents.clear()
    assert hands.promote(1) is None
    assert hands.standbys.keys() == {7}
    assert hands.reservations[0].held == {1}
