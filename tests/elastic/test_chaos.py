"""Does a line mean what it says, is nonsense refused in one line, and is the right one found?"""

from __future__ import annotations

import pytest

from concertina.elastic.chaos import Deed, Injection, Kind, Scene, Victim, parse
from concertina.errors import UserError
from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit

GOOD = {
    "kill rank=2 step=30": Injection(Deed.KILL, Kind.RANK, 2, step=30),
    "kill node=1 phase=recovering": Injection(Deed.KILL, Kind.NODE, 1, phase="recovering"),
    "freeze member=7 phase=last_checkpoint": Injection(Deed.FREEZE, Kind.MEMBER, 7, phase="last checkpoint"),
    "thaw coordinator after=1.5": Injection(Deed.THAW, Kind.COORDINATOR, after_s=1.5),
    "kill agent=0": Injection(Deed.KILL, Kind.AGENT, 0),
    "join step=9": Injection(Deed.JOIN, step=9),
    "flap node=1 times=3 every=0.5": Injection(Deed.FLAP, Kind.NODE, 1, times=3, every_s=0.5),
}


@pytest.mark.parametrize("line", GOOD)
def test_a_line_and_its_injection_are_the_same(line: str) -> None:
    assert parse(line) == GOOD[line]
    assert parse(str(GOOD[line])) == GOOD[line]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "begins with kill"),
        ("eat rank=1", "begins with kill"),
        ("kill", "whom?"),
        ("kill rank=1 rank=2", "one victim"),
        ("kill rank", "rank takes a whole number"),
        ("kill rank=-1", "rank takes a whole number"),
        ("kill rank=1 step=x", "step takes a whole number"),
        ("kill rank=1 every=nan", "every takes a number"),
        ("kill rank=1 at=3", "'at=3' is none of"),
        ("join rank=1", "no victim"),
        ("freeze node=1", "hears no thaw"),
        ("kill rank=1 step=2 phase=moving", "not both"),
        ("kill rank=1 phase=dinner", "phase is one of step, validation"),
        ("kill coordinator phase=moving", "phases of the run only"),
        ("kill rank=1 times=0", "at least 1"),
    ],
)
def test_nonsense_is_refused_in_one_line(line: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line)
    assert problem in caught.value.message
    assert "\n" not in caught.value.message


def scene() -> Scene:
    """Two generations are possible; the newer one has members 4 and 2 on its ranks."""
    old = Seating(Layout(2, 1, 1, 1, 1, 1), (0, 2), (1, 0))
    new = Seating(Layout(2, 1, 1, 1, 1, 1), (4, 2), (1, 0))
    journal = {
        "coordinator_pid": 77,
        "pids": {"0": 10, "2": 12, "4": 14},
        "nodes": {"0": "gone", "2": "nodeb", "4": "nodec"},
        "seatings": {"3": old.to_json(), "12": new.to_json()},
    }
    return Scene.of(journal, ["head", "nodeb", "nodec"])


def test_the_victim_is_who_is_meant_now() -> None:
    found = {
        line: scene().find(parse(line)) for line in ("kill rank=0", "kill member=2", "kill node=2", "kill agent=0")
    }
    assert found == {
        "kill rank=0": Victim(Kind.RANK, 4, "nodec", 14),
        "kill member=2": Victim(Kind.MEMBER, 2, "nodeb", 12),
        "kill node=2": Victim(Kind.NODE, node="nodec"),
        "kill agent=0": Victim(Kind.AGENT, node="head"),
    }
    assert scene().find(parse("freeze coordinator")) == Victim(Kind.COORDINATOR, pid=77)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("kill rank=2", "no rank 2: the run has 2"),
        ("kill member=0", "no member 0: those there are 2, 4"),  # its node does not live
        ("kill node=3", "no node 3: the cluster has 3"),
        ("kill node=0", "kill another"),
    ],
)
def test_nobody_of_that_name(line: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        scene().find(parse(line))
