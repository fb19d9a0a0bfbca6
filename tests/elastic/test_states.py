"""Does every event take a run where it should, and is an end never left?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.states import RunEvent, RunState, transition

pytestmark = pytest.mark.unit

E, S = RunEvent, RunState
STARTED = [S.WAITING_FOR_CAPACITY, S.FORMING, S.TRAINING, S.RECOVERING, S.CHECKPOINTING]
ENDS = [S.FINISHED, S.STOPPED, S.FAILED]

# Every move there is; any other (state, event) changes nothing.
MOVES = {
    (S.WAITING_FOR_CAPACITY, E.CAPACITY): S.FORMING,
    (S.WAITING_FOR_CAPACITY, E.STOP_ASKED): S.STOPPED,
    (S.FORMING, E.FORMED): S.TRAINING,
    (S.FORMING, E.STOP_ASKED): S.STOPPED,
    (S.FORMING, E.SHORTAGE): S.WAITING_FOR_CAPACITY,
    (S.TRAINING, E.STOP_ASKED): S.CHECKPOINTING,
    (S.TRAINING, E.LOSS): S.RECOVERING,
    (S.TRAINING, E.DONE): S.FINISHED,
    (S.TRAINING, E.LEFT): S.STOPPED,
    (S.RECOVERING, E.FORMED): S.TRAINING,
    (S.RECOVERING, E.SHORTAGE): S.WAITING_FOR_CAPACITY,
    (S.CHECKPOINTING, E.LOSS): S.RECOVERING,
    (S.CHECKPOINTING, E.DONE): S.FINISHED,
    (S.CHECKPOINTING, E.LEFT): S.STOPPED,
    **{(state, E.FAILURE): S.FAILED for state in STARTED},
}


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("event", E)
def test_every_transition(state: RunState, event: RunEvent) -> None:
    assert transition(state, event) is MOVES.get((state, event), state)


@given(st.lists(st.sampled_from(list(E))))
def test_an_end_is_never_left(events: list[RunEvent]) -> None:
    state, ended = S.WAITING_FOR_CAPACITY, None
    for event in events:
        state = transition(state, event)
        if ended is not None:
            assert state is ended
        elif state.is_end:
            ended = state


@given(st.lists(st.sampled_from([event for event in E if event is not E.FAILURE])))
def test_nobody_fails_without_a_failure_nor_finishes_without_training(events: list[RunEvent]) -> None:
    state, been = S.WAITING_FOR_CAPACITY, set()
    for event in events:
        state = transition(state, event)
        been.add(state)
    assert S.FAILED not in been
    assert S.FINISHED not in been or {S.FORMING, S.TRAINING} <= been


@pytest.mark.parametrize("state", STARTED)
def test_every_state_that_is_no_end_can_reach_every_end(state: RunState) -> None:
    reached, front = {state}, {state}
    while front:
        front = {transition(at, event) for at in front for event in E} - reached
        reached |= front
    assert set(ENDS) <= reached


def test_ends_and_their_exit_codes() -> None:
    assert [state for state in S if state.is_end] == ENDS
    assert {state: state.exit_code for state in ENDS} == {S.FINISHED: 0, S.STOPPED: 103, S.FAILED: 100}
    assert {state.exit_code for state in STARTED} == {101}
