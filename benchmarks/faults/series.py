"""Many faults in a row: sessions of several layouts, one after the other, and what became of each."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.faults.deeds import choose
from benchmarks.faults.found import Found, Strike, count_bells
from benchmarks.faults.proof import again
from benchmarks.faults.session import Session
from benchmarks.faults.subject import corpus_of
from concertina.errors import UserError
from concertina.track.events import read_events

__all__ = ["LAYOUTS", "series"]

LAYOUTS: list[dict[str, Any]] = [
    {"ep": 2},
    {"tp": 2, "ep": 2},
    {"pp": 2, "ep": 2},
    {"cp": 2, "ep": 4},
    {"tp": 2, "ep": 2, "etp": 2},
    {"pp": 2, "virtual_stages": 2},
    {"cp": 2, "tp": 2, "ep": 4},
    {"pp": 2, "cp": 2},
]
_STANDBYS = (1, 1, 1, 0)
"""Of sessions in turn: with a process in reserve a killed member's seat is taken at once."""

_MOST_PAUSE_S = 0.2
_SAY_EVERY = 25


def series(folder: Path, faults: int, seed: int) -> list[Found]:
    """All layouts in turn, so many faults in all."""
    shares = [faults // len(LAYOUTS) + (number < faults % len(LAYOUTS)) for number in range(len(LAYOUTS))]
    return [
        _one(folder, layout, share, seed * 1000 + number, _STANDBYS[number % len(_STANDBYS)])
        for number, (layout, share) in enumerate(zip(LAYOUTS, shares, strict=True))
        if share
    ]


def _one(folder: Path, layout: dict[str, Any], faults: int, seed: int, standbys: int) -> Found:
    name = " ".join(f"{axis} {degree}" for axis, degree in layout.items())
    found, random, began_s = Found(name), Random(seed), time.monotonic()
    storage = folder / f"runs-{seed}"
    session = Session(storage, corpus_of(folder), layout, standbys)
    try:
        with session:
            session.await_whole()
            lost: set[int] = set()
            for number in range(faults):
                time.sleep(random.uniform(0, _MOST_PAUSE_S))
                lost |= _strike(session, random, found, lost)
                session.look(number)
                if (number + 1) % _SAY_EVERY == 0:
                    print(f"{name}: {number + 1} faults, step {session.step}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - hours of faults are not lost for one; it counts as a run that hangs
        found.broken_off = str(error) if isinstance(error, UserError) else repr(error)
        print(f"{name}: broken off: {found.broken_off}", file=sys.stderr, flush=True)
    losses = found.read(list(read_events(session.folder.events_file)))
    found.held = session.held
    found.left = _members() + count_bells(session.plan.session)
    if not found.broken_off:
        found.deviation = again(session.plan.job, session.plan.corpus, session.plan.checkpoints, losses)
        shutil.rmtree(session.folder.path)
    print(f"{name}: {time.monotonic() - began_s:.0f} s, {found.deviation}", file=sys.stderr, flush=True)
    return found


def _strike(session: Session, random: Random, found: Found, lost: set[int]) -> set[int]:
    """One fault; who was lost by it."""
    deed, began_s = choose(random), time.monotonic()
    expected = deed(session, random)
    new = session.lost() - lost
    seconds = time.monotonic() - began_s
    found.strikes.append(Strike(deed.__name__, tuple(sorted(expected)), tuple(sorted(new)), seconds))
    return new


def _members() -> int:
    """Processes of members: those below the one that they are forked from, which stays."""
    own = psutil.Process()
    return len(own.children(recursive=True)) - len(own.children())
