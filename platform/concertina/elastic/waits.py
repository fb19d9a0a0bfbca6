"""How long does anything wait, on whose behalf, and what happens then? One table, one primitive.

No wait of ours is without a bound. The bounds lean on each other: `ORDER` says which must outlast which, and a test
holds the table to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

__all__ = ["BOUNDS", "ORDER", "Bound", "Ending", "Outlasts", "wait"]


@dataclass(frozen=True)
class Bound:
    """One bounded wait: who waits, for how long, and what happens at the bound."""

    name: str
    owner: str
    seconds: float
    then: str

    @property
    def timedelta(self) -> timedelta:
        return timedelta(seconds=self.seconds)

    def __str__(self) -> str:
        return f"{self.owner} waited {self.seconds:g} s ({self.name}): {self.then}"


_TABLE = [
    # A cluster of this machine
    Bound("cluster_start", "driver", 90, "the start fails and what was started is ended"),
    Bound("cluster_end", "driver", 30, "the keeper is killed, and its processes with it"),
    Bound("actors_finish", "keeper", 50, "the cluster ends although actors of ours live"),
    # A run begins
    Bound("placement_group", "coordinator", 10, "the reservation is given back and tried again"),
    Bound("member_start", "coordinator", 120, "a member that is not there by then is given up"),
    Bound("gather", "coordinator", 20, "the run begins, or grows, with the members that are there"),
    Bound("collective", "rank", 120, "the collective raises and the rank reports it"),
    # A generation
    Bound("halt", "coordinator", 20, "members that have not halted are given up"),
    Bound("storage", "coordinator", 1860, "a member that writes or loads a checkpoint, and does not halt, is given up"),
    Bound("prepare", "coordinator", 30, "a planned change is called off; a member that joins alone is given up"),
    Bound("form", "coordinator", 60, "all are halted and form anew, without a loss"),
    Bound("load", "coordinator", 1800, "the same, where the state comes from a checkpoint"),
    Bound("complaint", "coordinator", 3, "members that lost their peers, none of which is lost, form anew"),
    # The supervision channel
    Bound("channel_connect", "rank", 2, "the next attempt, a little later"),
    Bound("channel_greeting", "coordinator", 3, "a connection that has not proved itself is closed"),
    Bound("channel_unanswered", "rank", 10, "the kernel ends a connection whose other end acknowledges nothing"),
    Bound("silence", "coordinator", 2, "a member that trains, in a world that makes no step, is given up"),
    Bound("silence_busy", "coordinator", 30, "a member that builds, loads or writes is given up"),
    Bound("cut_off", "coordinator", 0.15, "a member whose connection broke, and whose peers complain, is given up"),
    Bound("cut_off_alone", "coordinator", 5, "a member whose connection broke is given up"),
    # Something went wrong
    Bound("stands_still", "coordinator", 5, "agents try whether nodes reach each other, where steps are shorter"),
    Bound("probe", "agent", 1, "a node that takes no connection by then is not reached"),
    Bound("ask_ray", "coordinator", 3, "it goes on with what the channel knows"),
    Bound("ask_agent", "coordinator", 0.3, "nobody can say whether the process stands still"),
    Bound("recorder_full", "coordinator", 15, "the run ends: storage takes nothing of far too much that is queued"),
    Bound("record", "coordinator", 5, "it goes on without what members said last: storage hangs"),
    # Somebody is gone
    Bound("driver_silence", "coordinator", 10, "the run stops with a checkpoint"),
    Bound("coordinator_frozen", "agent", 12, "a coordinator whose process stands still is ended: Ray starts it again"),
    Bound("coordinator_silence", "rank", 25, "the rank stops with a checkpoint and leaves"),
    # The end
    Bound("last_checkpoint", "rank", 15, "the rank leaves without it"),
    Bound("tracking_close", "coordinator", 8, "what MLflow has not taken stays spooled for the next time"),
    Bound("coordinator_lingers", "coordinator", 5, "it leaves although nobody has asked for the outcome"),
    Bound("agent_lease", "agent", 55, "every process of the run on its node is killed, and the agent leaves"),
]
BOUNDS = {bound.name: bound for bound in _TABLE}


@dataclass(frozen=True)
class Outlasts:
    """`longer` must be longer than `shorter` one after the other, or the reason does not hold."""

    longer: str
    shorter: tuple[str, ...]
    why: str

    @property
    def holds(self) -> bool:
        return BOUNDS[self.longer].seconds > sum(BOUNDS[name].seconds for name in self.shorter)


_STOP_WITHOUT_DRIVER = (
    *("driver_silence", "last_checkpoint"),
    *("record", "record"),  # to say why, and at the very end
    *("tracking_close", "coordinator_lingers"),
)
ORDER = [
    Outlasts("actors_finish", _STOP_WITHOUT_DRIVER, "a run without a driver ends in order before its cluster"),
    Outlasts("agent_lease", ("coordinator_silence", "last_checkpoint"), "ranks leave by themselves first"),
    Outlasts(
        "coordinator_silence", ("driver_silence", "channel_connect"), "a coordinator that restarts is found again"
    ),
    Outlasts(
        "coordinator_silence", ("channel_unanswered",), "a broken connection is replaced before its rank gives up"
    ),
    Outlasts("coordinator_silence", ("recorder_full",), "ranks hear why the run ends before they leave by themselves"),
    Outlasts("coordinator_silence", ("coordinator_frozen",), "a frozen coordinator is replaced before ranks give up"),
    Outlasts("collective", ("silence_busy", "halt"), "a member that hangs is given up before the collective's end"),
    Outlasts(
        "collective", ("stands_still", "ask_ray", "ask_ray"), "links are looked at twice before a collective ends"
    ),
    Outlasts("load", ("collective", "form"), "who waits for a member that does not load says so first"),
    Outlasts("storage", ("load", "halt"), "a change while all load a checkpoint gives up none of them"),
    Outlasts("cut_off_alone", ("channel_connect",), "one missed attempt is no loss"),
    Outlasts("complaint", ("silence", "cut_off"), "a loss is found before its peers form anew without one"),
    Outlasts("silence_busy", ("silence",), "who is busy has more time"),
]


class Ending(StrEnum):
    """How a wait ended."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    BOUND = "bound"


def wait(
    bound: Bound,
    done: Callable[[], bool],
    interrupt: threading.Event | None = None,
    poll: timedelta = timedelta(seconds=0.02),
) -> Ending:
    """Until `done()`, until `interrupt` is set (a new generation, a stop), or the bound. `done` is asked first."""
    deadline = time.monotonic() + bound.seconds
    interrupted = threading.Event() if interrupt is None else interrupt
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return Ending.BOUND
        if interrupted.wait(min(left, poll.total_seconds())):
            return Ending.DONE if done() else Ending.INTERRUPTED
    return Ending.DONE
