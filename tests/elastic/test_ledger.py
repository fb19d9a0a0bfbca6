"""Do the coordinator's books say where every second went, though each member knows only its own part, and some die?"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.elastic.account import TOLERANCE, Bucket
from concertina.elastic.ledger import Ledger, Price
from concertina.elastic.timesheet import Timesheet
from tests.elastic.a_session import REPORT_EVERY_S, Session

pytestmark = pytest.mark.unit


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    detection_s=st.floats(0.01, 6),
    reconfiguration_s=st.floats(0.02, 4),
    voided=st.booleans(),
    raises_at_once=st.booleans(),
    faults=st.integers(0, 3),
)
def test_the_books_are_the_truth(
    seed: int, detection_s: float, reconfiguration_s: float, voided: bool, raises_at_once: bool, faults: int
) -> None:
    """Whatever the members can and cannot know: each bucket within a hundredth of all time."""
    session = Session(seed, members=5, raises_at_once=raises_at_once)
    session.form(4)
    for fault in range(faults + 1):
        for _ in range(session.random.randint(4, 8)):
            session.step()
        session.validate()
        if fault < faults:
            session.lose(fault, detection_s, reconfiguration_s, voided)
    for member in session.living:
        session.say(member)
    session.advance(0.01)
    account = session.ledger.account(session.now)
    truth = session.truth()
    assert account.total_s == pytest.approx(sum(truth.values()) + 0.01 * len(session.living))
    assert account.imbalance == pytest.approx(0, abs=1e-4)  # words are under way for up to 2 ms
    assert account.is_balanced
    # Of the dead nobody knows what it did between its last word and the fault: it counts as detection.
    unknowable_s = faults * REPORT_EVERY_S
    for bucket in Bucket:
        slack_s = unknowable_s if bucket in (Bucket.DETECTION, Bucket.PRODUCTIVE, Bucket.RECOMPUTATION) else 0
        slack_s += unknowable_s * 0.25 if bucket in (Bucket.EXPOSED_COMMUNICATION, Bucket.VALIDATION) else 0
        error_s = abs(account.of(bucket) - truth[bucket])
        assert error_s <= TOLERANCE * account.total_s + slack_s, (bucket, account.of(bucket), truth[bucket])


def one_member(ledger: Ledger, reports: list[tuple[float, dict[str, float]]], member: int = 0) -> None:
    for t, totals in reports:
        ledger.report(member, t, totals)


def test_a_member_never_heard_of_was_starting() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 10, "a")
    assert ledger.account(14).seconds == {Bucket.STARTING: 4}
    ledger.lost(0, 15)
    assert ledger.account(99).seconds == {Bucket.STARTING: 5}
    assert ledger.account(99).total_s == 5


def test_between_two_words_it_is_where_it_was() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    ledger.report(0, 2, {"starting": 1}, Bucket.STARTING)
    ledger.report(0, 5, {"starting": 1, "spare": 3}, Bucket.SPARE)
    assert ledger.account(9).seconds == {Bucket.STARTING: 2, Bucket.SPARE: 7}
    ledger.left(0, 8)
    assert ledger.account(9).seconds == {Bucket.STARTING: 2, Bucket.SPARE: 6}


def test_without_being_told_it_was_in_what_grew_most() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    one_member(ledger, [(1, {"starting": 1}), (4, {"starting": 1.5, "productive": 2.5})])
    assert ledger.account(6).of(Bucket.PRODUCTIVE) == 4.5


@pytest.mark.parametrize(("inside", "tail"), [(Bucket.PRODUCTIVE, Bucket.DETECTION), (Bucket.SPARE, Bucket.SPARE)])
def test_the_last_seconds_of_the_dead(inside: Bucket, tail: Bucket) -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    ledger.report(0, 5, {"starting": 1, inside.value: 4}, inside)
    ledger.lost(0, 8)
    account = ledger.account(100)
    assert account.of(tail) == (3 if tail is not inside else 7)
    assert account.total_s == 8
    assert account.of(Bucket.OTHER) == 0


def test_seconds_nobody_accounts_for_are_other() -> None:
    """A sheet that loses time, as a bug would make it."""
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    for n in range(1, 20):
        ledger.report(0, 10 * n, {"productive": 10.0 * min(n, 12)}, Bucket.PRODUCTIVE)
    account = ledger.account(190)
    assert account.of(Bucket.OTHER) == 70
    assert (account.is_balanced, account.imbalance) == (False, 0)


def test_seconds_counted_twice_show_as_imbalance() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    ledger.report(0, 10, {"starting": 9}, Bucket.STARTING)
    for n in range(2, 20):
        ledger.report(0, 10 * n, {"starting": 9, "productive": 11.0 * (n - 1)}, Bucket.PRODUCTIVE)
    account = ledger.account(190)
    assert account.imbalance > TOLERANCE
    assert not account.is_balanced


def test_late_and_strange_words_change_nothing() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    one_member(ledger, [(1, {"starting": 1}), (9, {"starting": 1, "productive": 8}), (9.1, {"starting": 1})])
    ledger.report(7, 9, {"productive": 1})
    before = ledger.account(10)
    ledger.lost(0, 9)
    ledger.report(0, 9.5, {"starting": 1, "productive": 8.5})
    ledger.left(0, 20)
    assert before.of(Bucket.PRODUCTIVE) == 9
    after = ledger.account(10)
    assert (after.total_s, after.seconds) == (9, {Bucket.STARTING: 1, Bucket.PRODUCTIVE: 8})


def test_a_loss_estimated_before_the_last_word_takes_nothing_back() -> None:
    ledger = Ledger(0, wanted=1)
    ledger.born(0, 0, "a")
    one_member(ledger, [(1, {"starting": 1}), (9, {"starting": 1, "productive": 8})])
    ledger.lost(0, 8)
    account = ledger.account(10)
    assert (account.total_s, account.imbalance) == (9, 0)


def a_survivor(ledger: Ledger) -> None:
    """Voids the step of [8, 12] at 12, in which somebody died at 10; told at 12."""
    ledger.born(0, 0, "a")
    one_member(ledger, [(1, {"starting": 1}), (8, {"starting": 1, "productive": 7})])


def test_a_fault_takes_from_the_voided_step_what_was_waiting() -> None:
    ledger = Ledger(0, wanted=1)
    a_survivor(ledger)
    ledger.fault(10, 12)
    # While it does not know yet, its word says that it works.
    ledger.report(0, 11.9, {"starting": 1, "productive": 10.9}, Bucket.PRODUCTIVE)
    open_claim = ledger.account(12)
    assert (open_claim.of(Bucket.DETECTION), open_claim.of(Bucket.PRODUCTIVE)) == (2, pytest.approx(9))
    totals = {"starting": 1, "productive": 7, "recomputation": 4, "reconfiguration": 1}
    ledger.report(0, 13, totals, Bucket.RECONFIGURATION)
    ledger.report(0, 20, {**totals, "productive": 14}, Bucket.PRODUCTIVE)
    assert ledger.account(20).seconds == {
        Bucket.STARTING: 1,
        Bucket.PRODUCTIVE: 14,
        Bucket.RECOMPUTATION: 2,
        Bucket.DETECTION: 2,
        Bucket.RECONFIGURATION: 1,
    }


def test_what_the_rank_itself_called_detection_is_not_claimed_again() -> None:
    ledger = Ledger(0, wanted=1)
    a_survivor(ledger)
    ledger.fault(10, 12)
    totals = {"starting": 1, "productive": 7, "recomputation": 2.5, "detection": 1.5, "reconfiguration": 1}
    ledger.report(0, 13, totals, Bucket.RECONFIGURATION)
    account = ledger.account(13)
    assert (account.of(Bucket.DETECTION), account.of(Bucket.RECOMPUTATION)) == (2, 2)


def test_spares_and_those_already_in_a_recovery_lose_nothing_to_a_fault() -> None:
    ledger = Ledger(0, wanted=1)
    for member, bucket in ((0, Bucket.SPARE), (1, Bucket.RECONFIGURATION)):
        ledger.born(member, 0, "a")
        one_member(ledger, [(1, {"starting": 1}), (8, {"starting": 1, bucket.value: 7})], member)
    ledger.fault(9, 12)
    for member, bucket in ((0, Bucket.SPARE), (1, Bucket.RECONFIGURATION)):
        ledger.report(member, 13, {"starting": 1, bucket.value: 12}, bucket)
    assert ledger.account(13).seconds == {Bucket.STARTING: 2, Bucket.SPARE: 12, Bucket.RECONFIGURATION: 12}


def test_missing_ranks_are_beside_the_sum() -> None:
    ledger = Ledger(0, wanted=3)
    for member in range(3):
        ledger.born(member, 1, "a")
    assert ledger.account(1).missing_s == 3
    ledger.lost(0, 10)
    ledger.lost(1, 12)
    ledger.born(3, 15, "b")
    ledger.want(20, 2)
    account = ledger.account(30)
    assert account.missing_s == 3 + (2 * 1 + 3 * 2) + 5 * 1
    assert account.total_s == 9 + 11 + 29 + 15
    assert ledger.account(11).missing_s == 3 + 1


def test_spares_fill_the_place_of_the_missing_but_not_twice() -> None:
    ledger = Ledger(0, wanted=2)
    for member in range(4):
        ledger.born(member, 0, "a")
    ledger.lost(0, 5)
    ledger.lost(1, 5)
    ledger.lost(2, 6)
    assert ledger.account(10).missing_s == 4


def test_dollars_are_those_of_the_nodes_held() -> None:
    """Two nodes of four ranks at 7.2 dollars an hour, for ten minutes."""
    ledger = Ledger(0, wanted=8, price=Price(7.2, 4))
    for member in range(8):
        ledger.born(member, 0, f"node{member // 4}")
        ledger.report(member, 0, {}, Bucket.STARTING)
        ledger.report(member, 600, {"starting": 60, "productive": 540}, Bucket.PRODUCTIVE)
    account = ledger.account(600)
    assert account.usd == pytest.approx(2 * 7.2 / 6)
    assert account.usd_by_bucket is not None
    assert account.usd_by_bucket[Bucket.PRODUCTIVE] == pytest.approx(0.9 * 2 * 7.2 / 6)
    assert Ledger(0, 1).account(10).usd is None


def test_a_restarted_coordinator_goes_on_with_the_same_books() -> None:
    session = Session(3)
    session.form(4)
    for _ in range(5):
        session.step()
    session.lose(1, 0.5, 0.2)
    document = json.loads(json.dumps(session.ledger.to_json(session.now)))
    other_clock = 7e6
    restored = Ledger.from_json(document, session.now + other_clock)
    before, after = session.ledger.account(session.now + 1), restored.account(session.now + other_clock + 1)
    assert after.total_s == pytest.approx(before.total_s)
    assert after.seconds == pytest.approx(before.seconds)
    assert (after.missing_s, after.usd) == (pytest.approx(before.missing_s), pytest.approx(before.usd))
    restored.lost(0, session.now + other_clock + 2)
    assert restored.account(session.now + other_clock + 9).members == 4


# -- processes that really run ---------------------------------------------------------------------------------------


def _member(pipe: Connection) -> None:
    """Works in short steps, with a word after each, until it is told to leave or killed."""
    sheet = Timesheet()
    while not pipe.poll():
        sheet.begin_step()
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            pass
        with sheet.spend(Bucket.SNAPSHOT_STALL):
            time.sleep(0.005)
        sheet.end_step()
        pipe.send((sheet.totals(), sheet.current.value))
    sheet.enter(Bucket.DRAINING)
    pipe.send((sheet.totals(), sheet.current.value))


def test_processes_one_of_which_is_killed() -> None:
    """Real clocks, pipes and a real kill. A second that no member explains stays unexplained, a word that was long
    under way does not: so of what is unexplained the least over the last words counts."""
    context = multiprocessing.get_context("fork")
    ledger = Ledger(time.monotonic(), wanted=2)
    pipes: dict[Connection, int] = {}
    processes = []
    for member in range(2):
        ours, theirs = context.Pipe()
        ledger.born(member, time.monotonic(), "here")
        process = context.Process(target=_member, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        pipes[ours] = member
        processes.append(process)
    killed, heard, unexplained = False, 0, []
    try:
        while pipes and heard < 120:
            for pipe in wait(list(pipes), timeout=30):
                assert isinstance(pipe, Connection)
                try:
                    totals, inside = pipe.recv()
                except (EOFError, ConnectionResetError):
                    ledger.lost(pipes.pop(pipe), time.monotonic())
                    continue
                heard += 1
                ledger.report(pipes[pipe], time.monotonic(), totals, inside)
                if heard > 80:
                    unexplained.append(ledger.account(time.monotonic()).share(Bucket.OTHER))
                if heard > 50 and not killed:
                    killed = True
                    assert processes[0].pid is not None
                    os.kill(processes[0].pid, signal.SIGKILL)
    finally:
        for process in processes:
            process.kill()
            process.join()
    account = ledger.account(time.monotonic())
    assert list(pipes.values()) == [1]
    assert abs(account.imbalance) <= TOLERANCE
    assert min(unexplained) <= TOLERANCE
    assert account.of(Bucket.DETECTION) > 0
    assert account.of(Bucket.PRODUCTIVE) > 0
    assert account.of(Bucket.SNAPSHOT_STALL) > 0
