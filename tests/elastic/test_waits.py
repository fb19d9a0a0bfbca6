"""Do the bounds fit together, and does the one wait end for the right reason?"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from concertina.elastic.waits import BOUNDS, ORDER, Bound, Ending, Outlasts, wait

pytestmark = pytest.mark.unit

LONG = Bound("long", "test", 60, "the test fails")
SHORT = replace(LONG, name="short", seconds=0.05)


@pytest.mark.parametrize("rule", ORDER, ids=lambda rule: f"{rule.longer}>{'+'.join(rule.shorter)}")
def test_the_order_of_the_bounds(rule: Outlasts) -> None:
    assert rule.holds, f"{rule.why}: {BOUNDS[rule.longer]}"


def test_a_run_without_a_driver_is_gone_within_a_minute() -> None:
    assert BOUNDS["actors_finish"].seconds < 60
    assert BOUNDS["agent_lease"].seconds < 60


def test_every_bound_says_who_waits_and_what_then() -> None:
    assert all(name == bound.name for name, bound in BOUNDS.items())
    assert all(bound.seconds > 0 and bound.owner and bound.then for bound in BOUNDS.values())
    assert str(BOUNDS["halt"]) == "coordinator waited 20 s (halt): members that have not halted are given up"


def test_a_loss_is_found_before_anybody_gives_up_waiting_for_it() -> None:
    """What the coordinator waits before it gives a member up, against what that member's peers wait."""
    quick = ("silence", "cut_off", "halt", "complaint")
    assert max(BOUNDS[name].seconds for name in quick) < BOUNDS["prepare"].seconds < BOUNDS["form"].seconds
    assert BOUNDS["form"].seconds < BOUNDS["collective"].seconds
    assert BOUNDS["halt"].seconds + BOUNDS["form"].seconds < BOUNDS["collective"].seconds


def test_done_at_once_even_when_interrupted() -> None:
    interrupt = threading.Event()
    interrupt.set()
    assert wait(LONG, lambda: True, interrupt) is Ending.DONE


def test_interrupted() -> None:
    interrupt = threading.Event()
    threading.Timer(0.05, interrupt.set).start()
    assert wait(LONG, lambda: False, interrupt) is Ending.INTERRUPTED


def test_bound() -> None:
    assert wait(SHORT, lambda: False) is Ending.BOUND
    assert wait(SHORT, lambda: False, threading.Event()) is Ending.BOUND


def test_done_later() -> None:
    answers = iter([False, False, True])
    assert wait(LONG, lambda: next(answers)) is Ending.DONE
