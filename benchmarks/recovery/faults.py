"""What happens to a run, and exactly when? Faults that are no message to anybody: signals, and a node more or less.

A time is CLOCK_MONOTONIC's right before the first signal, or right after a new node is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = [
    "Fault",
    "add_node",
    "freeze_node",
    "freeze_process",
    "kill_node",
    "kill_process",
    "kill_processes",
    "thaw_process",
]

# Why not by `actors/injector.py`? It has a node's agent strike, and peers have no agent: all are hit by the same hand.
# Nor can an agent freeze its whole node: it would stand still with its own signal, in the middle of them.


@dataclass(frozen=True)
class Fault:
    """`pids` are those that it hit, none for a join."""

    kind: str
    at_s: float
    pids: tuple[int, ...] = ()


def kill_process(pid: int) -> Fault:
    """kill -9. Raises ProcessLookupError when it is gone already: then nothing was measured."""
    at_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return Fault("process killed", at_s, (pid,))


def kill_processes(pids: Iterable[int], kind: str) -> Fault:
    """kill -9 to all of them, in this order, as fast as one can; those that went meanwhile are fine."""
    return _strike(pids, signal.SIGKILL, kind)


def _strike(pids: Iterable[int], number: signal.Signals, kind: str) -> Fault:
    at_s, hit = time.monotonic(), []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            hit.append(pid)
    return Fault(kind, at_s, tuple(hit))


def freeze_process(pid: int) -> Fault:
    """SIGSTOP: the process keeps its sockets and says nothing more. `thaw_process` or a SIGKILL must follow."""
    at_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    return Fault("process frozen", at_s, (pid,))


def thaw_process(pid: int) -> None:
    """SIGCONT, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill_node(cluster: Any, node: Any) -> Fault:
    """A node of a `ray.cluster_utils.Cluster` goes with all that runs on it, as a machine does that loses power.

    The raylet's workers get their signal with it: left to Ray, they would end a little later than their machine.
    """
    fault = kill_processes(_processes_of(node), "node killed")
    cluster.remove_node(node, allow_graceful=False)  # reaps what is dead
    return fault


def freeze_node(node: Any) -> Fault:
    """All of a node stands still, as a machine does that hangs: connections stay, and nobody on it speaks, or looks at
    anybody. `kill_node` must follow; it ends stopped processes as well."""
    return _strike(_processes_of(node), signal.SIGSTOP, "node frozen")


def _processes_of(node: Any) -> list[int]:
    """What Ray has started for it, and everything below that."""
    roots = [psutil.Process(process.pid) for _, process in node.live_processes()]
    return [process.pid for process in [*roots, *(child for root in roots for child in root.children(recursive=True))]]


def add_node(add: Callable[[], Any]) -> tuple[Fault, Any]:
    """`add` returns the new node once the cluster knows it; the join begins then."""
    node = add()
    return Fault("join", time.monotonic()), node
