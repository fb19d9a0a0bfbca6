"""Does a run on cores that are wanted by twice as many give up a member that lives? And how long are the gaps then?

`concertina train` with the elastic quickstart: driver, coordinator, agents, four ranks and two standbys, all in this
machine. From its first steps on two processes a core burn beside them, until the run has stopped in order.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from concertina.elastic.channel import Gaps
from concertina.errors import UserError
from concertina.track.events import Event, EventType, read_events
from infra.processes import end_descendants

__all__ = ["BURNERS_A_CORE", "Strain", "burners", "measure", "strain_of"]

ROOT = Path(__file__).parent.parent.parent
JOB = ROOT / "jobs" / "quickstart-elastic.yaml"
BURNERS_A_CORE = 2
FIRST_STEPS = 5
_BEGIN_S, _END_S, _LOOK_S = 300.0, 180.0, 2.0
_BURN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


@dataclass(frozen=True)
class Strain:
    """What became of the run. `given_up` says of each member that was lost why; `gaps` is None when the coordinator did
    not come to its end."""

    minutes: float
    steps_s: list[float]
    given_up: list[str]
    gaps: Gaps | None
    busy_gaps: Gaps | None
    runnable: list[float] = field(default_factory=list)
    ended: str = ""
    """Why the run ended before it was told to."""


def measure(minutes: float, keep: Path | None = None) -> Strain:
    """Raises UserError when the run does not even begin."""
    with tempfile.TemporaryDirectory(prefix="supervision-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _measure(folder, minutes)
        finally:
            end_descendants(timedelta(seconds=10))


def _measure(folder: Path, minutes: float) -> Strain:
    runnable: list[float] = []
    with (folder / "driver.log").open("wb") as log:
        settings = [f"storage_path={folder / 'runs'}", "training.steps=1000000"]
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "jobs.cli", "train", str(JOB), *words]
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    with ExitStack() as ending:
        ending.callback(_end, driver)
        _until_it_trains(driver, folder)
        ending.enter_context(burners(BURNERS_A_CORE * _cores()))
        began_s, began_ns = time.monotonic(), time.time_ns()
        while driver.poll() is None and time.monotonic() < began_s + 60 * minutes:
            time.sleep(_LOOK_S)
            runnable.append(_runnable())
        lasted_min = (time.monotonic() - began_s) / 60
        ended = "" if driver.poll() is None else f"concertina train ended with {driver.returncode}:\n{_tail(folder)}"
        _end(driver)
    return strain_of(_events(folder), began_ns, lasted_min, runnable, ended)


def strain_of(events: list[Event], began_ns: int, minutes: float, runnable: list[float], ended: str) -> Strain:
    """What a run's events say of the time since `began_ns`; gaps are of its whole life."""
    late = [event for event in events if event.ts_ns >= began_ns]
    lost = [e for e in late if e.type == EventType.MEMBER and e.data.get("what") == "lost"]
    told = [e.data for e in events if e.type == EventType.HEARTBEATS]
    training, busy = (
        Gaps.together(Gaps.from_json(gaps) for data in told for gaps in data[name].values()) if told else None
        for name in ("training", "busy")
    )
    return Strain(
        minutes,
        [float(e.data["step_s"]) for e in late if e.type == EventType.STEP],
        [f"member {e.data.get('member')}: {e.data.get('reason')}" for e in lost],
        training,
        busy,
        runnable,
        ended,
    )


@contextmanager
def burners(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that always want a core, at the usual niceness; they end with this block, or with us."""
    burning: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            burning.append(subprocess.Popen([sys.executable, "-S", "-c", _BURN]))
        yield burning
    finally:
        for process in burning:
            process.kill()
        for process in burning:
            process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _runnable() -> float:
    """Threads of the whole machine that run or want to, a core; without the one that asks."""
    running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
    return (int(running) - 1) / _cores()


def _until_it_trains(driver: subprocess.Popen[bytes], folder: Path) -> None:
    deadline_s = time.monotonic() + _BEGIN_S
    while sum(event.type == EventType.STEP for event in _events(folder)) < FIRST_STEPS:
        if driver.poll() is not None or time.monotonic() > deadline_s:
            raise UserError(f"no {FIRST_STEPS} steps within {_BEGIN_S:.0f} s:\n{_tail(folder)}")
        time.sleep(_LOOK_S)


def _end(driver: subprocess.Popen[bytes]) -> None:
    """As a person does: the run leaves a checkpoint, and the coordinator its last words."""
    if driver.poll() is None:
        driver.terminate()
        try:
            driver.wait(_END_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait(10)


def _events(folder: Path) -> list[Event]:
    return [event for path in (folder / "runs").glob("*/events.jsonl") for event in read_events(path)]


def _tail(folder: Path) -> str:
    return (folder / "driver.log").read_text(errors="replace")[-4000:]
