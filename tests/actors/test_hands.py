"""Who holds which room, and does nobody take a seat without being held?"""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.assignment import RunPlan
from actors.hands import Hands, Member
from concertina.config import Job
from concertina.layout import Layout

pytestmark = pytest.mark.unit


@pytest.fixture
def hands(tmp_path: Path) -> Hands:
    """Member 1 on a node, and a standby beside it."""
    job = Job.model_validate({"name": "a", "cluster": {"num_workers": 2}})
    plan = RunPlan("a-1", tmp_path, tmp_path, job, Layout(2), "cpu", "session", "token")
    made = Hands(plan, ("127.0.0.1", 1), 8)
    made.members, made.standbys = {1: Member(1, "node", None, 11)}, {7: Member(7, "node", None, 77)}
    return made


def test_a_standby_takes_the_room_of_who_is_lost_beside_it(hands: Hands) -> None:
    hands.agents["node"] = None
    heir = hands.promote(1)
    assert heir is hands.members[7]
    assert hands.standbys == {}


def test_nobody_is_promoted_on_a_node_that_is_gone_as_well(hands: Hands) -> None:
    """Who is not held would be seated, and never be missed."""
    assert hands.promote(1) is None
    assert (set(hands.members), set(hands.standbys)) == ({1}, {7})
