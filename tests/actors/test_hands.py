"""Does the coordinator know what it has in its hands? Without Ray: what its books say, and how it asks agents."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from actors.assignment import RunPlan
from actors.hands import Hands, Member, Reservation, _cause
from concertina.config import Job
from concertina.elastic.losses import Reason
from concertina.layout import Layout

pytestmark = pytest.mark.unit


@pytest.fixture
def hands() -> Hands:
    """Member 1 on node a, with a standby beside it and an agent."""
    job = Job.model_validate({"name": "a"})
    plan = RunPlan("a-1", Path(), Path(), job, Layout(1), "cpu", "session", "token")
    made = Hands(plan, ("127.0.0.1", 1), itertools.count(8).__next__)
    made.members = {1: Member(1, "a", None, 11)}
    made.standbys = {7: Member(7, "a", None, 77)}
    agent: Any = object()
    made.agents = {"a": agent}
    made.reservations = [Reservation("room", "a", agent, 1, None, {1}, is_ready=True)]
    return made


def test_a_standby_takes_the_room_of_the_member_beside_it(hands: Hands) -> None:
    heir = hands.promote(1)
    assert heir is not None
    assert heir.number == 7
    assert hands.members[7] is heir
    assert hands.standbys == {}
    assert hands.reservations[0].held == {7}


def test_nobody_is_promoted_on_a_node_whose_agent_is_gone(hands: Hands) -> None:
    """It would have a seat and be no member: nobody would miss it."""
    hands.agents.clear()
    assert hands.promote(1) is None
    assert hands.standbys.keys() == {7}
    assert hands.reservations[0].held == {1}


def died(message: str, node: NodeDeathInfo | None = None) -> RayError:
    """What Ray 2.60 raises of an actor that is gone, made as Ray makes it."""
    context = ActorDiedErrorContext(error_message=message, class_name="Rank", pid=7, node_ip_address="10.0.0.1")
    context.actor_id = b"\0" * 16
    if node is not None:
        context.node_death_info.CopyFrom(node)
    return ActorDiedError(context)


def raised(cause: Exception) -> RayTaskError:
    """By `Rank.__init__`."""
    trace = "Traceback\nImportError: no such library"
    return RayTaskError("Rank.__init__", trace, cause, "ray", 7, "10.0.0.1", actor_id="00")


KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
RAYS_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: c59f) was "
    "5.24GB used / 23.54GB limit (0.222457)\nOOM kill reason: Memory usage 5569130496B exceeded threshold"
)
NODE = "The actor died because its node has died. Node Id: c59f\n\tthe actor's node was terminated"
PREEMPTED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, reason_message="spot")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (died(KILLED), Reason.KILLED),
        (died("The actor is dead because it was killed by `ray.kill`."), Reason.KILLED),
        (RayActorError(), Reason.KILLED),
        (OutOfMemoryError(RAYS_MEMORY), Reason.OUT_OF_MEMORY),
        (died(RAYS_MEMORY), Reason.OUT_OF_MEMORY),
        (died("Task was killed due to the node running out of memory."), Reason.OUT_OF_MEMORY),
        (died(NODE), Reason.NODE),
        (died(NODE, NodeDeathInfo(reason=NodeDeathInfo.UNEXPECTED_TERMINATION)), Reason.NODE),
        (died(NODE, PREEMPTED), Reason.PREEMPTED),
        (ActorDiedError.from_task_error(raised(ImportError("no such library"))), Reason.RAISED),
        (RuntimeEnvSetupError("no room for it"), Reason.RAISED),
    ],
)
def test_what_ray_says_of_an_end(error: RayError, reason: Reason) -> None:
    assert _cause(error)[0] is reason
