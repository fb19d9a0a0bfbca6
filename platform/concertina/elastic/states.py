"""In which state is a run, and which event takes it where? One function makes one transition."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["RunEvent", "RunState", "transition"]


class RunState(StrEnum):
    """States of a run; the last three are ends."""

    WAITING_FOR_CAPACITY = "waiting_for_capacity"
    FORMING = "forming"
    TRAINING = "training"
    RECOVERING = "recovering"
    CHECKPOINTING = "checkpointing"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        return self in (RunState.FINISHED, RunState.STOPPED, RunState.FAILED)

    @property
    def exit_code(self) -> int:
        """Of the command that waits for the run (0 done, 100 failed, 103 stopped, 101 not yet at an end)."""
        return {RunState.FINISHED: 0, RunState.FAILED: 100, RunState.STOPPED: 103}.get(self, 101)


class RunEvent(StrEnum):
    """What moves a run from state to state."""

    CAPACITY = "capacity"
    FORMED = "formed"
    LOSS = "loss"
    SHORTAGE = "shortage"
    STOP_ASKED = "stop_asked"
    DONE = "done"
    LEFT = "left"
    FAILURE = "failure"


_TRANSITIONS = {
    (RunState.WAITING_FOR_CAPACITY, RunEvent.CAPACITY): RunState.FORMING,
    (RunState.WAITING_FOR_CAPACITY, RunEvent.STOP_ASKED): RunState.STOPPED,
    (RunState.FORMING, RunEvent.FORMED): RunState.TRAINING,
    # Nothing has been trained that a checkpoint could keep.
    (RunState.FORMING, RunEvent.STOP_ASKED): RunState.STOPPED,
    (RunState.TRAINING, RunEvent.STOP_ASKED): RunState.CHECKPOINTING,
    (RunState.TRAINING, RunEvent.LOSS): RunState.RECOVERING,
    (RunState.CHECKPOINTING, RunEvent.LOSS): RunState.RECOVERING,
    (RunState.RECOVERING, RunEvent.FORMED): RunState.TRAINING,
    (RunState.RECOVERING, RunEvent.SHORTAGE): RunState.WAITING_FOR_CAPACITY,
    (RunState.FORMING, RunEvent.SHORTAGE): RunState.WAITING_FOR_CAPACITY,
    (RunState.RECOVERING, RunEvent.STOP_ASKED): RunState.RECOVERING,
    (RunState.TRAINING, RunEvent.DONE): RunState.FINISHED,
    (RunState.TRAINING, RunEvent.LEFT): RunState.STOPPED,
    (RunState.CHECKPOINTING, RunEvent.STOP_ASKED): RunState.CHECKPOINTING,
    (RunState.CHECKPOINTING, RunEvent.DONE): RunState.FINISHED,
    (RunState.CHECKPOINTING, RunEvent.LEFT): RunState.STOPPED,
}


def transition(state: RunState, event: RunEvent) -> RunState:
    """The state after `event`. An end is never left; a failure ends any other state; what fits nowhere is ignored."""
    if state.is_end:
        return state
    if event is RunEvent.FAILURE:
        return RunState.FAILED
    return _TRANSITIONS.get((state, event), state)
