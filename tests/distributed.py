"""How does a test run a function on several ranks? `run_distributed(fn, world)`: forked from one that has torch.

`fn(rank, store, *args)` must be a module-level function; its results come back in rank order, and the first failing
rank's traceback is what the test sees. `on_ranks` does the same on processes that stay for the next test, for
functions that leave nothing behind.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty
from typing import Any

from concertina.layout import ENDS, GROUPS, STAGE, Layout
from concertina.parallel.groups import (
    KV,
    SECONDS,
    Group,
    GroupOptions,
    Groups,
    connect_store,
    form_groups,
    make_store,
)

__all__ = ["form", "listening_store", "on_ranks", "run_distributed", "seat"]

# What ranks need is imported once, by the process they are forked from.
_PRELOAD = ["torch", "pytest", "concertina.train.loop", "concertina.train.standalone", "tests.train.worlds"]


_ALONE_S = 10
"""How long peers of a rank that has died may be silent: most end by themselves, with an error or as the test wants."""


def listening_store(timeout_s: float = 30.0) -> Any:
    """A store of this process on a free loopback port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return make_store("127.0.0.1", listener.detach(), timedelta(seconds=timeout_s))


def form(layout: Layout, rank: int, store: Any, timeout_s: float = 30.0, kv_lanes: int = 1) -> Groups:
    """The groups of `rank`; a world of one needs no store."""
    if layout.world == 1:
        return Groups.alone()
    return form_groups(layout, rank, store, GroupOptions(timeout=timedelta(seconds=timeout_s)), kv_lanes)


def seat(layout: Layout, rank: int, kv_lanes: int = 1) -> Groups:
    """The groups of `rank` as far as building needs them: who is in them, and no way to talk."""
    members = {name: layout.group_of(name, rank) for name in (*GROUPS, STAGE)}
    members |= {
        KV: layout.neighbours_of(rank, kv_lanes),
        ENDS: layout.ends_of(rank),
        SECONDS: tuple(range(layout.world)),
    }
    named = {name: Group(name, ranks, ranks.index(rank)) for name, ranks in members.items()}
    return Groups(0, layout, Group("world", tuple(range(layout.world)), rank), named)


def _context() -> Any:
    # The fork server of Python 3.11 looks for what it preloads on PYTHONPATH only.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_distributed(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """Call `fn(rank, store, *args)` on `world` fresh processes; return their results in rank order."""
    context = _context()
    store = listening_store(timeout_s)
    results: Any = context.Queue()
    ranks = [
        context.Process(target=_main, args=(fn, rank, store.port, timeout_s, results, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(results, ranks, timeout_s)
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(results: Any, ranks: Sequence[Any], timeout_s: float) -> list[Any]:
    """What each rank says, in their order. `timeout_s` is the most between two of them."""
    found: dict[int, Any] = {}
    while missing := sorted(set(range(len(ranks))) - set(found)):
        rank, value, error = _next(results, [(number, ranks[number]) for number in missing], timeout_s)
        if error:
            codes = {number: ranks[number].exitcode for number in missing if ranks[number].exitcode}
            raise AssertionError(f"rank {rank} failed, dead before it by exit code {codes}:\n{error}")
        found[rank] = value
    return [found[rank] for rank in range(len(ranks))]


def _next(results: Any, ranks: Sequence[tuple[int, Any]], timeout_s: float) -> Any:
    waited_s, deadline = 0, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        codes = [process.exitcode for _, process in ranks]
        with suppress(Empty):  # what an ended one had said before is read first
            return results.get(timeout=1.0)
        waited_s += 1
        if None not in codes or (any(codes) and waited_s > _ALONE_S):
            break
    numbers, codes = [number for number, _ in ranks], [process.exitcode for _, process in ranks]
    raise TimeoutError(f"ranks {numbers} said nothing in {waited_s} s of {timeout_s}; exit codes {codes}")


def _main(fn: Callable[..., Any], rank: int, port: int, timeout_s: float, results: Any, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    store = connect_store("127.0.0.1", port, timedelta(seconds=timeout_s))
    try:
        results.put((rank, fn(rank, store, *args), None))
    except BaseException:  # noqa: BLE001 - whatever it was, the test must see it
        results.put((rank, None, traceback.format_exc()))


class _Pool:
    """Processes that wait for functions. One that fails ends them all: its peers may hang."""

    def __init__(self) -> None:
        self._context = _context()
        self._processes: list[Any] = []
        self._calls: list[Any] = []
        self._results: Any = self._context.Queue()

    def run(self, fn: Callable[..., Any], world: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        while len(self._processes) < world:
            self._calls.append(self._context.SimpleQueue())
            ends = (self._calls[-1], self._results)
            self._processes.append(self._context.Process(target=_serve, args=ends, daemon=True))
            self._processes[-1].start()
        store = listening_store(timeout_s)
        for rank in range(world):
            self._calls[rank].put((fn, rank, store.port, timeout_s, args))
        try:
            return _collect(self._results, self._processes[:world], timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self.__init__()  # type: ignore[misc]


def _serve(calls: Any, results: Any) -> None:
    while True:
        fn, rank, port, timeout_s, args = calls.get()
        _main(fn, rank, port, timeout_s, results, args)
        del fn, args
        gc.collect()  # what a test tied into a knot takes its threads along


_pool: _Pool | None = None


def on_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """`run_distributed` on ranks that are shared with other tests."""
    global _pool
    if _pool is None:
        _pool = _Pool()
        atexit.register(_pool.close)
    return _pool.run(fn, world, args, timeout_s)
