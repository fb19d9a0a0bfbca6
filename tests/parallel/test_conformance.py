"""What must every transport do? Form all groups, compute, end by a deadline or a fence, and form again, many times.

One set of tests for gloo, which runs everywhere, and for NCCL with four ranks on one GPU, which NCCL takes from 2.30 on
(torch 2.14). Those of NCCL are written, and have not been run: no GPU has been at hand.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.errors import ConfigError
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
from concertina.parallel.fence import Wires
from concertina.parallel.groups import GROUP_NAMES, Group, GroupOptions, Groups, form_groups
from concertina.parallel.nccl import refuse_bad_version, settings
from tests.distributed import run_distributed
from tests.parallel.test_fence import is_frozen, until

WORLD = 4
VICTIM = 3
BOUND_S = 5.0
LAYOUTS = [Layout(4, ep=2), Layout(4, tp=2, ep=4), Layout(4, pp=2, cp=2, etp=2), Layout(4, tp=2, cp=2, ep=2, etp=2)]


def why_not_nccl() -> str:
    """Why four ranks of NCCL cannot share a GPU here; empty when they can."""
    if not torch.cuda.is_available():
        return "no GPU"
    found = torch.cuda.nccl.version()
    return "" if found >= (2, 30) else f"NCCL {found} takes one rank a GPU: torch 2.14 brings one that takes several"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (why := why_not_nccl()):
        pytest.skip(why)
    return str(request.param)


class Rank:
    """One rank of a conformance test, and what it says to the others over the store."""

    def __init__(self, rank: int, store: Any, device: str) -> None:
        self.rank, self.store, self.device = rank, store, device
        if device == "cuda":
            os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
            torch.cuda.set_device(0)

    def form(
        self, generation: int, layout: Layout, wires: Wires | None = None, timeout_s: float = 60.0, lanes: int = 1
    ) -> Groups:
        options = GroupOptions(generation, self.device, timeout=timedelta(seconds=timeout_s))
        return form_groups(layout, self.rank, self.store, options, lanes, wires)

    def ones(self, length: int = 1 << 12) -> Tensor:
        return torch.ones(length, device=self.device)

    def sum_of(self, group: Group) -> float:
        return float(all_reduce_sum(self.ones(8) * (self.rank + 1), group).finish().sum())

    def meet(self, what: str, world: int) -> None:
        self.store.set(f"{what}/{self.rank}", "")
        self.store.wait([f"{what}/{rank}" for rank in range(world)])

    def ends(self, start: Callable[[], Pending[Tensor]], group: Group) -> str:
        """How a communication ends. NCCL's is over for the host before it is on the device: it is waited for there, and
        its generation is asked whether it stands."""
        try:
            start().finish()
            if self.device == "cuda":
                torch.cuda.synchronize()
            group.wires.check()
        except RuntimeError as error:
            return "broken" if is_communication_failure(error) else f"an unknown end: {error!r}"
        return "done"


# -- forming, and what is computed -------------------------------------------------------------------------------------


def every_layout(rank: int, store: Any, device: str) -> list[dict[str, list[int]]]:
    """Who answers in each group of each layout, one generation after the other."""
    own, found = Rank(rank, store, device), []
    for generation, layout in enumerate(LAYOUTS):
        groups = own.form(generation, layout, lanes=layout.tp)
        seen = {}
        for name in (*GROUP_NAMES, "world"):
            group = groups.world if name == "world" else groups[name]
            said = torch.full((group.size,), -1, dtype=torch.int64, device=device)
            mine = torch.tensor([rank], device=device)
            assert all_gather_into(said, mine, group).finish().tolist() == list(group.ranks)
            seen[name] = list(group.ranks)
        found.append(seen)
        own.meet(f"layout{generation}", WORLD)
        groups.fence()
        del groups, group
    return found


@pytest.mark.dist
def test_every_group_of_every_layout_in_the_same_processes(device: str) -> None:
    for rank, found in enumerate(run_distributed(every_layout, WORLD, device, timeout_s=120)):
        for layout, seen in zip(LAYOUTS, found, strict=True):
            assert seen["world"] == list(range(WORLD))
            assert seen["ep"] == list(layout.group_of("ep", rank))


def every_collective(rank: int, store: Any, device: str) -> None:
    own = Rank(rank, store, device)
    group = own.form(0, Layout(WORLD)).world
    x = torch.arange(WORLD, dtype=torch.float32, device=device) + 10 * rank
    assert all_reduce_sum(x.clone(), group).finish().tolist() == [60.0 + 4 * each for each in range(WORLD)]
    share = reduce_scatter_sum(torch.empty(1, device=device), x, group).finish()
    assert share.tolist() == [60.0 + 4 * rank]
    gathered = all_gather_into(torch.empty(WORLD, device=device), x[:1].contiguous(), group).finish()
    assert gathered.tolist() == [10.0 * each for each in range(WORLD)]
    sends = [(rank + each) % 3 for each in range(WORLD)]
    receives = [(each + rank) % 3 for each in range(WORLD)]
    traded = all_to_all_v(torch.full((sum(sends),), float(rank), device=device), sends, receives, group).finish()
    assert traded.tolist() == [float(each) for each in range(WORLD) for _ in range(receives[each])]
    after, before = (rank + 1) % WORLD, (rank - 1) % WORLD
    out = torch.empty(WORLD, device=device)
    exchange([(x, after)], [(out, before)], group).finish()
    assert out.tolist() == [each + 10.0 * before for each in range(WORLD)]


@pytest.mark.dist
def test_every_collective_gives_what_it_should(device: str) -> None:
    run_distributed(every_collective, WORLD, device, timeout_s=120)


# -- an end without a peer ---------------------------------------------------------------------------------------------


def without_a_peer(rank: int, store: Any, device: str, deed: str) -> None:
    """The last rank is killed or frozen with a communication pending; the others fence it and go on without. Checked
    here: of a world with a dead rank there is no result."""
    own = Rank(rank, store, device)
    groups = own.form(0, Layout(WORLD))
    own.sum_of(groups.world)  # or what is loaded with the first one would count
    if rank == VICTIM:
        store.set("pid", str(os.getpid()))
        own.meet("formed", WORLD)
        signal.pause()
    own.meet("formed", WORLD)
    pid = int(store.get("pid"))
    world, ends = groups.world, list[str]()
    waits = threading.Thread(target=lambda: ends.append(own.ends(partial(all_reduce_sum, own.ones(), world), world)))
    waits.start()
    own.store.set(f"begun/{rank}", "")
    own.store.wait([f"begun/{each}" for each in range(VICTIM)])
    if rank == 0:
        os.kill(pid, signal.SIGKILL if deed == "killed" else signal.SIGSTOP)
    if deed == "frozen":
        until(lambda: is_frozen(pid))
    else:
        until(lambda: not os.path.exists(f"/proc/{pid}/fd"))
    began_s = time.monotonic()
    groups.fence()
    waits.join(BOUND_S)
    took_s = time.monotonic() - began_s
    assert not waits.is_alive(), "a fenced communication goes on"
    again = own.form(1, Layout(WORLD - 1))
    total = own.sum_of(again.world)
    own.meet("again", WORLD - 1)
    if rank == 0 and deed == "frozen":
        os.kill(pid, signal.SIGKILL)
    assert ends == ["broken"]
    assert took_s < BOUND_S
    assert total == 8 * (1 + 2 + 3)


@pytest.mark.dist
@pytest.mark.parametrize("deed", ["killed", "frozen"])
def test_the_others_are_free_at_once_and_form_again_without_it(device: str, deed: str) -> None:
    with pytest.raises(TimeoutError, match=r"\[3\] said nothing"):  # none but the victim
        run_distributed(without_a_peer, WORLD, device, deed, timeout_s=60)


# -- forming that does not come about ----------------------------------------------------------------------------------


def nobody_else_comes(rank: int, store: Any, device: str, how: str) -> tuple[str, float]:
    """Rank 0 forms; rank 1 does not: a deadline or a fence from another thread ends it."""
    own = Rank(rank, store, device)
    if rank == 1:
        store.wait(["over"])
        return "", 0.0
    wires, began_s = Wires(), time.monotonic()
    if how == "fenced":
        threading.Timer(0.5, wires.fence).start()
    try:
        own.form(0, Layout(2), wires, timeout_s=1.5 if how == "late" else 60.0)
        said = "formed"
    except RuntimeError as error:
        said = "broken" if is_communication_failure(error) else repr(error)
    took_s = time.monotonic() - began_s
    store.set("over", "")
    return said, took_s


@pytest.mark.dist
@pytest.mark.parametrize("how", ["late", "fenced"])
def test_forming_has_an_end(device: str, how: str) -> None:
    said, took_s = run_distributed(nobody_else_comes, 2, device, how)[0]
    assert said == "broken"
    assert took_s < BOUND_S


def in_an_older_generation(rank: int, store: Any, device: str) -> str:
    own = Rank(rank, store, device)
    try:
        own.form(rank, Layout(2), timeout_s=1.0)
    except RuntimeError as error:
        return "broken" if is_communication_failure(error) else repr(error)
    return "formed"


@pytest.mark.dist
def test_an_older_generation_does_not_join_a_newer_one(device: str) -> None:
    assert run_distributed(in_an_older_generation, 2, device) == ["broken", "broken"]


def identity(pending: Pending[Tensor]) -> Pending[Tensor]:
    return pending


# -- again and again ---------------------------------------------------------------------------------------------------


def held(device: str) -> tuple[int, int, int]:
    """Threads, descriptors, and bytes of the device that are in use."""
    taken = 0
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        taken = total - free
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), taken


def a_hundred_times(rank: int, store: Any, device: str) -> list[tuple[int, int, int]]:
    """Form, compute, fence, with a communication pending in every fifth; what is held after each."""
    own, seen = Rank(rank, store, device), []
    for number in range(100):
        groups = own.form(number, LAYOUTS[number % len(LAYOUTS)])
        assert own.sum_of(groups.world) == 8 * 10
        own.meet(f"formed{number}", WORLD)
        if number % 5 == 0 and rank == 0:
            pending = all_reduce_sum(own.ones(), groups.world)
            groups.fence()
            assert own.ends(partial(identity, pending), groups.world) == "broken"
            del pending
        groups.fence()
        del groups
        own.meet(f"dropped{number}", WORLD)
        seen.append(held(device))
    return seen


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_hundred_generations_leave_nothing(device: str) -> None:
    for seen in run_distributed(a_hundred_times, WORLD, device, timeout_s=240):
        for early, late in zip(zip(*seen[8:20], strict=True), zip(*seen[-12:], strict=True), strict=True):
            assert max(late) <= max(early), seen


# -- what is refused and what is set -----------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("version", [(2, 25, 1), (2, 28, 3), (2, 28, 8)])
def test_versions_that_hang_or_crash_are_refused(version: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"use 2\.26\.2 to 2\.28\.2 or 2\.28\.9"):
        refuse_bad_version(version)


@pytest.mark.unit
@pytest.mark.parametrize("version", [(2, 26, 2), (2, 28, 2), (2, 28, 9), (2, 30, 7)])
def test_others_are_not(version: tuple[int, ...]) -> None:
    refuse_bad_version(version)


@pytest.mark.unit
def test_nobody_but_the_supervisor_ends_a_group() -> None:
    found = settings(timedelta(seconds=7.5))
    assert found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert found["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == "7"
    assert found["TORCH_DIST_USE_NCCL2"] == "0"
