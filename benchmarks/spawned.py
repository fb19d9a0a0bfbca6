"""How does a benchmark have ranks, without Ray? Processes that share a store; who ends without an answer is named."""

from __future__ import annotations

import multiprocessing
import queue
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

from concertina.errors import UserError

__all__ = ["Bounds", "answers_of"]


class Bounds(NamedTuple):
    """Of the store that ranks meet at, and of the wait for each one's answer."""

    store: timedelta
    answer_s: int


def answers_of(rank: Callable[..., None], world: int, bounds: Bounds, *arguments: Any) -> list[Any]:
    """What `rank(number, port of the store, *arguments, answers)`, a module-level function, puts into `answers`, of
    each of `world` fresh processes, in any order. Raises UserError when one ends without an answer."""
    from concertina.parallel.groups import make_store

    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    store = make_store("127.0.0.1", listener.detach(), bounds.store)
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    ranks = [context.Process(target=rank, args=(number, store.port, *arguments, answers)) for number in range(world)]
    for process in ranks:
        process.start()
    try:
        return [_answer(answers, ranks, number, bounds.answer_s) for number in range(world)]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def _answer(answers: Any, ranks: Sequence[Any], had: int, bound_s: int) -> Any:
    """The next one, after `had`."""
    for _ in range(bound_s):
        codes = [process.exitcode for process in ranks]
        with suppress(queue.Empty):  # who has ended has said before what it had to say
            return answers.get(timeout=1.0)
        if len(codes) - codes.count(None) > had:
            raise UserError(f"a rank ended without an answer; exit codes of all: {codes}")
    raise UserError(f"no answer in {bound_s} s")
