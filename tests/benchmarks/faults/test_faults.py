"""Does the benchmark of faults see what it is for: a run that is not whole, a step too many, a loss that is wrong?"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.faults import deeds
from benchmarks.faults.__main__ import rows_of
from benchmarks.faults.bare import cut_connections
from benchmarks.faults.deeds import DEEDS, bit_flipped, killed, stopped_for_a_moment
from benchmarks.faults.found import Deviation, Found, Leak, Strike, count_flaws, leaks_of, standing
from benchmarks.faults.held import Held
from benchmarks.faults.proof import again
from benchmarks.faults.session import VETERAN, Session
from benchmarks.faults.subject import WORLD
from concertina.track.events import Event, EventType, read_events


def event(kind: EventType, step: int | None = None, **data: Any) -> Event:
    return Event(1, "a-1", 0, kind, 0, step, data, 0)


def steps(*numbers: int) -> list[Event]:
    return [event(EventType.STEP, number, loss=float(number)) for number in numbers]


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_what_was_gone_back_over_does_not_stand() -> None:
    back = event(EventType.ROLLBACK, 4, to_step=2)
    assert standing([*steps(1, 2, 3, 4), back, *steps(3)]) == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("numbers", "flaws"), [((1, 2, 3), 0), ((1, 3), 1), ((1, 2, 2, 3), 3), ((2, 1), 2), ((1, 2, 2), 2)]
)
def test_a_step_that_is_missing_or_there_twice_is_seen(numbers: tuple[int, ...], flaws: int) -> None:
    assert count_flaws(standing(steps(*numbers))) == flaws


def held(*mebibytes: float, threads: int = 5) -> list[Held]:
    return [Held(threads, 20, int(size * (1 << 20))) for size in mebibytes]


@pytest.mark.unit
def test_a_leak_is_what_the_least_of_the_second_half_has_more() -> None:
    grows = Found("a", generations=20, held={"member": held(*range(100, 120))})
    wanders = Found("b", generations=20, held={"member": held(*[100, 130, 101, 125, 100] * 4)})
    assert leaks_of([grows])["member"].bytes == pytest.approx(8 * (1 << 20) / 10)
    assert leaks_of([wanders])["member"] == Leak(0.0, 0, 0)
    assert leaks_of([Found("c", held={"member": held(1, 2)})]) == {}, "too few to say"
    threads = [*held(*[100.0] * 8), *held(100.0, 100.0, threads=7)]
    assert leaks_of([Found("d", generations=1, held={"member": threads})])["member"].threads == 2


@pytest.mark.unit
def test_whatever_is_not_as_it_must_be_misses_its_goal() -> None:
    good = Found("a", [Strike("killed", (1,), (1,), 0.5)], deviation=Deviation(0.0, 0.0, 9))
    assert all(row.met is not False for row in rows_of("bare", 1, [good]))
    for bad in (
        Found("a", [Strike("killed", (1,), (1, 2), 0.5)]),
        Found("a", [Strike("killed", (1,), (), 0.5)]),
        Found("a", broken_off="not whole"),
        Found("a", flaws=1),
        Found("a", left=1),
        Found("a", deviation=Deviation(1e-6, 0.0, 9)),
    ):
        assert any(row.met is False for row in rows_of("bare", len(bad.strikes), [bad]))


@pytest.mark.unit
def test_what_another_process_found_arrives() -> None:
    found = Found("Ray", [Strike("node killed", (1, 2), (1, 2), 0.5)], steps=9, deviation=Deviation(0.0, 1e-15, 9))
    assert Found.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.unit
def test_a_connection_is_cut_and_nothing_is_left_of_the_hand_that_cuts_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        before = len(os.listdir("/proc/self/fd"))
        assert cut_connections(server.getsockname()) == 1
        assert near.recv(1) == far.recv(1) == b""
        assert len(os.listdir("/proc/self/fd")) == before
        far.close()


# -- a session ---------------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_members_without_ray_are_struck_and_nothing_is_lost(tmp_path: Path) -> None:
    random, lost, text = Random(3), set[int](), tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text(Path(deeds.__file__).read_text())
    with Session(tmp_path / "runs", text, {"tp": 2, "ep": 2}, standbys=1) as session:
        session.await_whole()
        for deed in (killed, stopped_for_a_moment, bit_flipped):
            expected = deed(session, random)
            assert session.lost() == lost | expected
            lost |= expected
            assert len(session.hands.members) == WORLD
        assert VETERAN in session.hands.members
        session.look(0)
    losses = dict(standing(read_events(session.folder.events_file)))
    assert len(lost) == 2
    assert len(session.held["member"]) == 1
    checked = again(session.plan.job, session.plan.corpus, session.plan.checkpoints, losses)
    assert checked.steps == len(losses) > 10
    assert max(checked.loss, checked.tensor) < 1e-9
    losses[5] *= 1 + 1e-6
    assert again(session.plan.job, session.plan.corpus, session.plan.checkpoints, losses).loss > 1e-7


@pytest.mark.unit
def test_every_deed_says_what_it_does() -> None:
    assert all(deed.__doc__ and weight > 0 for deed, weight in DEEDS.items())
