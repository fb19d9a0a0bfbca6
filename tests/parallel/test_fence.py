"""After a fence, does everything that waits raise, does no byte of a peer's arrive any more, and is nothing left?

A rank freezes (SIGSTOP) with a communication pending; the others fence, form the next generation without it and use
their memory again; then it wakes and goes on sending. Without a fence that overwrites their memory, which one test
shows, so that the others are known to look in the right place.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from concertina.layout import Layout
from concertina.parallel.collectives import (
    Pending,
    all_gather_into,
    all_reduce_sum,
    all_to_all_v,
    exchange,
    reduce_scatter_sum,
)
from concertina.parallel.failures import is_communication_failure
from concertina.parallel.fence import Address, Wires
from concertina.parallel.groups import SECONDS, Group, GroupOptions, Groups, form_crowd, form_groups
from tests.distributed import run_distributed

pytestmark = pytest.mark.dist

WORLD = 3
VICTIM = 2
LONG = timedelta(seconds=60)  # longer than a test may take: who ends before does so because of a fence
SIZES = [4 << 10, 256 << 10, 4 << 20, 64 << 20]
SEEDS, SOAK_SEEDS = range(3), range(3, 53)

# -- communications: of x and out, into one of them --------------------------------------------------------------------


def memory(size: int, value: int) -> tuple[Tensor, Tensor]:
    """About `size` bytes of input and of output, a whole number of pieces."""
    length = size // 4 // WORLD * WORLD
    return torch.full((length,), float(value)), torch.zeros(length)


def reducing(x: Tensor, out: Tensor, group: Group) -> Pending[Any]:
    return all_reduce_sum(x, group)


def scattering(x: Tensor, out: Tensor, group: Group) -> Pending[Any]:
    return reduce_scatter_sum(out[: x.numel() // group.size], x, group)


def gathering(x: Tensor, out: Tensor, group: Group) -> Pending[Any]:
    return all_gather_into(out, x[: x.numel() // group.size], group)


def trading(x: Tensor, out: Tensor, group: Group) -> Pending[Any]:
    each = [x.numel() // group.size] * group.size
    return all_to_all_v(x, each, each, group)  # into memory of its own


def exchanging(x: Tensor, out: Tensor, group: Group) -> Pending[Any]:
    others = [position for position in range(group.size) if position != group.rank]
    sends, receives = ([(piece.chunk(group.size)[each], each) for each in others] for piece in (x, out))
    return exchange(sends, receives, group)


KINDS: dict[str, Callable[[Tensor, Tensor, Group], Pending[Any]]] = {
    "all_reduce": reducing,
    "reduce_scatter": scattering,
    "all_gather": gathering,
    "all_to_all": trading,
    "exchange": exchanging,
}

# -- a rank that freezes -----------------------------------------------------------------------------------------------


@dataclass
class Play:
    """What one rank does in one case after another; a case is a generation of all, then one of the survivors."""

    rank: int
    store: Any
    number: int = 0

    def form(self, world: int, wires: Wires | None = None, timeout: timedelta = LONG) -> Groups:
        options = GroupOptions(self.number, timeout=timeout)
        return form_groups(Layout(world), self.rank, self.store, options, wires=wires)

    def say(self, what: str, value: str = "") -> None:
        self.store.set(f"{what}/{self.number}/{self.rank}", value)

    def hear(self, what: str, rank: int) -> str:
        return self.store.get(f"{what}/{self.number}/{rank}").decode()

    def meet(self, what: str, ranks: range) -> None:
        self.say(what)
        self.store.wait([f"{what}/{self.number}/{rank}" for rank in ranks])


def is_frozen(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.001)


def freeze_in(delay_s: float) -> None:
    """This process, after a while, wherever it is then."""
    threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGSTOP)).start()


def outcome(pending: Pending[Any]) -> str:
    """How a communication ended."""
    try:
        pending.finish()
    except RuntimeError as error:
        return "broken" if is_communication_failure(error) else f"an unknown end: {error}"
    return "done"


def frozen_rank(play: Play, kind: str, size: int, delay_s: float | None) -> None:
    """Freeze right before the communication, or some time after it began; woken, go on as if nothing had been, until
    the supervisor hears of it."""
    play.say("pid", str(os.getpid()))
    play.number += 1
    groups = play.form(WORLD)
    threading.Thread(target=fence_later, args=(play.store, f"woken/{play.number}/0", groups)).start()
    play.meet("formed", range(WORLD))
    x, out = memory(size, VICTIM)
    if delay_s is None:
        os.kill(os.getpid(), signal.SIGSTOP)
        said = attempt(lambda: KINDS[kind](x, out, groups.world))
    else:
        freeze_in(delay_s)
        said = attempt(lambda: KINDS[kind](x, out, groups.world))
        play.store.wait([f"woken/{play.number}/0"])  # frozen in here at the latest
    if said == "broken":
        try:  # with those who are in a newer generation; ports that gloo still keeps of the old one let it connect
            again = play.form(WORLD, timeout=timedelta(seconds=0.2))
            said += " met" if outcome(all_reduce_sum(torch.ones(8), again.world)) == "done" else " alone"
        except RuntimeError as error:
            said += " refused" if is_communication_failure(error) else repr(error)
    play.say("ended", said)


def fence_later(store: Any, woken: str, groups: Groups) -> None:
    """The supervisor of a rank that was frozen hears a little after it has woken that the others went on."""
    until(lambda: store.check([woken]))
    time.sleep(0.1)
    groups.fence()


def attempt(start: Callable[[], Pending[Any]]) -> str:
    try:
        return outcome(start())
    except RuntimeError as error:
        return "broken" if is_communication_failure(error) else f"an unknown end: {error}"


def left_over() -> set[threading.Thread]:
    """What keeps, until gloo's timeout, a communication that was broken off in mid-message: and the rank's port."""
    return {thread for thread in threading.enumerate() if thread.name == "left-over"}


def survivor(play: Play, kind: str, size: int, fences: bool) -> dict[str, Any]:
    """Fence with the communication pending, use the memory again, wake the frozen rank, look at the memory."""
    play.number += 1
    pid = int(play.store.get(f"pid/{play.number - 1}/{VICTIM}"))
    groups = play.form(WORLD)
    x, out = memory(size, play.rank)
    play.meet("formed", range(WORLD))
    pending = KINDS[kind](x, out, groups.world)
    play.meet("begun", range(VICTIM))  # or one would end what the other has yet to begin
    until(lambda: is_frozen(pid))
    ends: list[str] = []
    before = left_over()
    if fences:
        waiting = threading.Thread(target=lambda: ends.append(outcome(pending)))
        waiting.start()
        groups.fence()
        waiting.join()
        del groups
    play.say("kept", str(len(left_over() - before)))
    play.number += 1_000_000
    new = play.form(WORLD - 1)
    play.number -= 1_000_000
    for tensor in (x, out):
        tensor.fill_(7.0)
    total = all_reduce_sum(torch.ones(8), new.world).finish()
    play.meet("reused", range(VICTIM))
    if play.rank == 0:
        os.kill(pid, signal.SIGCONT)
        play.say("woken")
    zombie = play.hear("ended", VICTIM)
    if not fences:
        ends.append(outcome(pending))
    time.sleep(0.02)
    intact = all(bool((tensor == 7.0).all()) for tensor in (x, out))
    total += all_reduce_sum(torch.ones(8), new.world).finish()
    kept = all(play.hear("kept", rank) != "0" for rank in range(VICTIM))
    return {"ends": ends, "zombie": zombie, "kept": kept, "intact": intact, "total": float(total.sum())}


def cases(rank: int, store: Any, todo: list[tuple[str, int, float | None]], fences: bool) -> list[dict[str, Any]]:
    play, found = Play(rank, store), []
    for kind, size, delay_s in todo:
        if rank == VICTIM:
            frozen_rank(play, kind, size, delay_s)
        else:
            found.append({"case": (kind, size, delay_s), **survivor(play, kind, size, fences)})
    return found


def seeded(size: int, seeds: range) -> list[tuple[str, int, float | None]]:
    """Every kind, frozen before it begins and at a seeded moment of it."""
    todo: list[tuple[str, int, float | None]] = []
    for seed in seeds:
        moment = random.Random(f"{size} {seed}")
        for kind in KINDS:
            during_s = moment.uniform(0, 2e-3 + size * 2e-9)
            todo.append((kind, size, None if seed % 3 == 0 else during_s))
    return todo


def check(found: list[dict[str, Any]]) -> None:
    for case in found:
        assert case["intact"], case
        assert case["total"] == 4 * 8, case
        away = "broken alone" if case["zombie"] == "broken alone" and case["kept"] else "broken refused"
        if case["case"][2] is None:
            assert case["ends"] == ["broken"], case
            assert case["zombie"] == away, case
        else:  # it may have been frozen after it had given all it owed
            assert set(case["ends"]) <= {"broken", "done"}, case
            assert case["zombie"] in (away, "done"), case


@pytest.mark.parametrize("size", SIZES)
def test_a_thawed_peer_changes_no_byte(size: int) -> None:
    for found in run_distributed(cases, WORLD, seeded(size, SEEDS), True, timeout_s=100)[:VICTIM]:
        assert len(found) == len(SEEDS) * len(KINDS)
        check(found)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", SIZES)
def test_a_thawed_peer_changes_no_byte_many_times(size: int) -> None:
    for found in run_distributed(cases, WORLD, seeded(size, SOAK_SEEDS), True, timeout_s=1700)[:VICTIM]:
        check(found)


def test_without_a_fence_it_does() -> None:
    """The mutation: all else being equal, memory of every kind that is written to in place is overwritten."""
    kinds = [kind for kind in KINDS if kind != "all_to_all"]
    for found in run_distributed(cases, WORLD, [(kind, 256 << 10, None) for kind in kinds], False)[:VICTIM]:
        assert [case["ends"] for case in found] == [["done"]] * len(kinds)
        assert [case["intact"] for case in found] == [False] * len(kinds), found


# -- a peer that dies --------------------------------------------------------------------------------------------------


def beside_a_killed_peer(rank: int, store: Any) -> str:
    """Rank 3 of 4 is killed; its neighbours fence, rank 1 only waits."""
    play = Play(rank, store)
    groups = play.form(4)
    play.meet("formed", range(4))
    if rank == 3:
        store.set("pid", str(os.getpid()))
        signal.pause()
    pending = all_reduce_sum(torch.ones(1 << 16), groups.world)
    if rank == 0:
        os.kill(int(store.get("pid")), signal.SIGKILL)
    said = outcome(pending)
    if rank != 1:
        groups.fence()
    store.set(f"said/{rank}", said)
    store.wait([f"said/{each}" for each in range(3)])
    assert said == "broken", said
    return said


def test_a_killed_peer_frees_everybody() -> None:
    """Of a ring, the one that is not beside the dead is freed by its neighbours' fence."""
    with pytest.raises(TimeoutError, match=r"\[3\] said nothing"):  # none but the dead
        run_distributed(beside_a_killed_peer, 4, timeout_s=20)


# -- groups that are still forming -------------------------------------------------------------------------------------


class Sleeper(Wires):
    """Of a rank that stops at the n-th time it learns of addresses: 1 before it is heard of, 2 before it connects."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def forming(self, listening: set[Address]) -> None:
        super().forming(listening)
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)


def fenced_while_forming(rank: int, store: Any) -> list[str]:
    play, said = Play(rank, store), []
    for at in (1, 2):
        play.number += 1
        if rank == VICTIM:
            play.say("pid", str(os.getpid()))
            try:
                play.form(WORLD, Sleeper(at), timedelta(seconds=0.5))
                said.append("formed")  # with sockets that are shut: it was the one to connect
            except RuntimeError as error:
                said.append("broken" if is_communication_failure(error) else repr(error))
            continue
        wires, pid = Wires(), int(play.hear("pid", VICTIM))
        forming = threading.Thread(target=lambda wires=wires: said.append(attempt_to_form(play, wires)))
        forming.start()
        until(partial(is_frozen, pid))
        wires.fence()
        forming.join()
        play.number += 1_000_000
        new = play.form(WORLD - 1)
        assert float(all_reduce_sum(torch.ones(1), new.world).finish()) == 2
        play.meet("without it", range(VICTIM))
        play.number -= 1_000_000
        if rank == 0:
            os.kill(pid, signal.SIGCONT)
    return said


def attempt_to_form(play: Play, wires: Wires) -> str:
    try:
        play.form(WORLD, wires)
    except RuntimeError as error:
        return "broken" if is_communication_failure(error) else repr(error)
    return "formed"


def test_a_half_formed_generation_is_fenced_from_another_thread() -> None:
    *survivors, victim = run_distributed(fenced_while_forming, WORLD)
    for said in survivors:
        assert said[0] == "broken"
        assert set(said) <= {"broken", "formed"}  # who connects to a frozen rank is done
    assert set(victim) <= {"broken", "formed"}


# -- what is left ------------------------------------------------------------------------------------------------------


def open_things() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def form_and_fence(rank: int, store: Any, cycles: int) -> list[tuple[int, int]]:
    """Threads and descriptors after every cycle; every fifth has a communication that never ends."""
    play, seen = Play(rank, store), []
    for cycle in range(cycles):
        play.number += 1
        groups = play.form(2)
        crowd = form_crowd(rank, 2, store, GroupOptions(play.number, timeout=LONG), groups.world.wires)
        play.meet("formed", range(2))
        pending = all_reduce_sum(torch.ones(4), groups["dp"]) if rank == 0 and cycle % 5 == 0 else None
        groups.fence()
        groups.fence()
        if pending is not None:
            assert outcome(pending) == "broken"
        for group in (groups.world, groups[SECONDS], crowd):
            with pytest.raises(RuntimeError) as caught:
                all_reduce_sum(torch.ones(4), group).finish()
            assert is_communication_failure(caught.value), caught.value
        del groups, crowd, group, pending, caught
        play.meet("dropped", range(2))
        seen.append(open_things())
    return seen


def test_nothing_is_left_of_fenced_generations() -> None:
    for seen in run_distributed(form_and_fence, 2, 50):
        early, late = seen[4:10], seen[-6:]
        assert max(late) <= max(early), seen


def others_connections(rank: int, store: Any) -> None:
    """A connection of this process, one to the store, and a socket that listens: all as before."""
    play = Play(rank, store)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        groups = play.form(2)
        play.meet("formed", range(2))
        groups.fence()
        near.sendall(b"still here")
        assert far.recv(100) == b"still here"
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()
        far.close()
    play.meet("fenced", range(2))
    other = play
    other.number += 1
    again = other.form(2)  # another generation is another's
    groups.fence()
    assert float(all_reduce_sum(torch.ones(1), again.world).finish()) == 2


def test_the_connections_of_others_are_left_alone() -> None:
    run_distributed(others_connections, 2)
