"""How much of a step do heartbeats and commits take? Four ranks of the quickstart and a channel of their own.

Each rank runs the real loop over the real link; a process of its own has the channel's server and writes what is
committed into an event log, as the coordinator does. Turns without beats, with beats at their interval, and with ten
times as many alternate. Two ways to the same number:
- processor time of the threads that do nothing else, by their own clocks (pthread_getcpuclockid);
- the time of a step, turn against turn: ten times as many cost nine times more than the real ones do.
Commits: their parts are timed where they happen, and the all-reduce is made with and without their two numbers.

Of the coordinator only the channel's thread and what it calls is here: who judges, four times a second, is not.
"""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.snapshots import NODES, QUICKSTART, RANKS, AnyBatch
from concertina.config import load_job
from concertina.elastic.channel import BEAT_S, ChannelClient

__all__ = ["OFF", "REAL", "STEPS_A_TURN", "TENFOLD", "TIMES", "Turns", "measure"]

STEPS_A_TURN = 12
TIMES = 10
OFF, REAL, TENFOLD = "no beats", "beats", f"{TIMES} x as many"
_BEATS_S = {OFF: 1e6, REAL: BEAT_S, TENFOLD: BEAT_S / TIMES}
_TOKEN = secrets.token_hex(16)
_TIMEOUT = timedelta(seconds=300)
_LOOPBACK = "127.0.0.1"
_REDUCES = 40
SETTINGS = ["training.steps=1000000", "training.eval_every_steps=1000000", "checkpoint.every_steps=1000000"]

Turns = dict[str, list[dict[str, Any]]]
"""Of one rank, way to its turns: seconds, cpu_s of its supervisor thread, server_cpu_s (first rank only); of every time
that a part was done the seconds, and under `<part> cpu` the processor seconds; seconds of `reduce`, `reduce without`.
Parts are commit (`_commit_previous`, the first rank's `send` in it), note, send, progress and spent."""


class Stopwatch:
    """How long parts of a step take the thread that calls, by the clock and by its processor time."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        cpu_s, began_s = time.thread_time(), time.perf_counter()
        yield
        self.samples.setdefault(part, []).append(time.perf_counter() - began_s)
        self.samples.setdefault(f"{part} cpu", []).append(time.thread_time() - cpu_s)


def measure(rounds: int) -> list[Turns]:
    """By rank. A round of warm-up is left out."""
    from concertina.parallel.groups import make_store

    listener = socket.create_server((_LOOPBACK, 0), backlog=64)
    store = make_store(_LOOPBACK, listener.detach(), _TIMEOUT)
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="concertina-supervision-") as folder:
        server: Any = context.Process(target=_coordinate, args=(Path(folder), theirs, _TOKEN))
        server.start()
        processes = [server]
        try:
            address = _heard(ours)
            for rank in range(RANKS):
                place = (rank, store.port, address, _TOKEN, Path(folder))
                pipe = ours if rank == 0 else None
                processes.append(context.Process(target=_rank, args=(place, pipe, rounds, answers)))
                processes[-1].start()
            found = dict(answers.get(timeout=3600) for _ in range(RANKS))
        finally:
            for process in processes[1:]:
                process.join(10)
            for process in processes:
                process.kill()
    return [found[rank] for rank in range(RANKS)]


def _cpu_s(name: str) -> float:
    """Processor seconds that the thread of this name has used."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _coordinate(folder: Path, pipe: Any, token: str) -> None:
    """The coordinator's end: what is heard is on disk before it is acknowledged. Tells its thread's time when asked."""
    from actors.book import Book
    from concertina.elastic.channel import ChannelServer
    from concertina.elastic.ledger import Ledger
    from concertina.elastic.messages import TimeSpent, decode
    from concertina.track.events import EventLog

    book = Book(EventLog(folder / "events.jsonl", "supervision"), folder / "checkpoints", keep=1)

    ledger = Ledger(time.monotonic(), RANKS)
    for rank in range(RANKS):
        ledger.born(rank, time.monotonic(), str(NODES[rank]))

    def heard(member: int, document: dict[str, Any]) -> None:
        message = decode(document)
        if isinstance(message, TimeSpent):
            ledger.report(member, time.monotonic(), message.seconds, message.inside)
            return
        book.record(message)
        server.recorded = book.recorded

    server = ChannelServer(_LOOPBACK, token, heard, lambda member, evidence: None)
    pipe.send(server.address)
    while True:
        pipe.recv()
        pipe.send(_cpu_s("channel-server"))


def _rank(place: tuple[int, int, tuple[str, int], str, Path], pipe: Any, rounds: int, answers: Any) -> None:
    import torch

    from concertina.model.host_memory import keep_freed_memory
    from concertina.parallel.groups import connect_store

    rank, port, address, token, folder = place
    torch.set_num_threads(1)
    keep_freed_memory()
    loop, stopwatch = _loop(rank, connect_store(_LOOPBACK, port, _TIMEOUT), folder)
    turns: Turns = {way: [] for way in _BEATS_S}
    ways = list(_BEATS_S)
    for turn in range(rounds + 1):
        ways = ways[::-1] if turn % 2 else ways[1:] + ways[:1]  # each comes after each other
        for way in ways:
            client = ChannelClient(address, token, rank, _BEATS_S[way])
            client.start(lambda document: None)
            while not client.is_connected:
                time.sleep(0.01)
            loop.link.client, loop.link.beats = client, way != OFF
            sample = _turn(loop, stopwatch, pipe)
            client.flush(timedelta(seconds=10))
            client.close()
            if turn:
                turns[way].append(sample)
    answers.put((rank, turns))


def _loop(rank: int, store: Any, folder: Path) -> tuple[Any, Stopwatch]:
    import torch

    from actors.link import RankLink
    from actors.rank_log import Stamp
    from concertina.elastic.messages import Message, encode
    from concertina.elastic.second_owners import place_seconds
    from concertina.elastic.timesheet import Timesheet
    from concertina.layout import Layout, Seating
    from concertina.parallel.groups import GroupOptions, form_groups
    from concertina.train.engine import Engine, StepResult
    from concertina.train.loop import Loop

    stopwatch = Stopwatch()

    class TimedLink(RankLink):
        beats = True

        def send(self, message: Message) -> None:
            with stopwatch.time("send"):
                if self.beats:
                    super().send(message)
                else:  # no heartbeat would take it along
                    self.client.send(encode(message))

        def progress(self, step: int, phase: str) -> None:
            with stopwatch.time("progress"):
                super().progress(step, phase)

        def spent(self, sheet: Timesheet) -> None:
            if self.beats:
                with stopwatch.time("spent"):
                    super().spent(sheet)

    class TimedLoop(Loop):
        def note(self, result: StepResult | None) -> StepResult | None:
            with stopwatch.time("note"):
                return super().note(result)

        def _commit_previous(self, result: StepResult) -> None:
            with stopwatch.time("commit"):
                super()._commit_previous(result)

    job = load_job(QUICKSTART, SETTINGS)
    layout, seconds = Layout(RANKS, ep=job.layout.ep), place_seconds(NODES)
    groups = form_groups(layout, rank, store, GroupOptions(0, timeout=_TIMEOUT))
    engine = Engine(job, AnyBatch(job), AnyBatch(job), torch.device("cpu"))
    seating = Seating(layout, tuple(range(RANKS)), seconds)
    engine.adopt(engine.prepare(seating, rank, groups, "initial"))
    engine.start_anew()
    client = ChannelClient(("", 0), "", rank)  # each turn has its own
    loop = TimedLoop(engine, folder, TimedLink(client, Stamp(rank)))
    loop.sit(0)
    return loop, stopwatch


def _turn(loop: Any, stopwatch: Stopwatch, pipe: Any) -> dict[str, Any]:
    """Some steps of one way, begun and ended together."""
    engine = loop.engine
    stopwatch.samples = {}
    engine.confirm()
    server_s, cpu_s, began_s = _server_s(pipe), _cpu_s("supervisor"), time.perf_counter()
    for _ in range(STEPS_A_TURN):
        loop._step(engine.applied + 1)
    engine.settle()
    sample = {"seconds": time.perf_counter() - began_s, "cpu_s": _cpu_s("supervisor") - cpu_s}
    engine.confirm()
    sample["server_cpu_s"] = _server_s(pipe) - server_s
    return sample | stopwatch.samples | _reduces(engine)


def _server_s(pipe: Any) -> float:
    if pipe is None:
        return 0.0
    pipe.send("?")
    return float(_heard(pipe))


def _heard(pipe: Any) -> Any:
    """The next that comes. Raises TimeoutError."""
    if not pipe.poll(_TIMEOUT.total_seconds()):
        raise TimeoutError("the coordinator's end of the channel does not answer: did its process end?")
    return pipe.recv()


def _reduces(engine: Any) -> dict[str, list[float]]:
    """Seconds of a step's one all-reduce with what commits need, as `Engine.train_step` makes it, and without."""
    import torch

    model = engine.job.model
    head = torch.zeros(6, dtype=torch.float64)
    counts = torch.zeros(model.num_experts * (model.num_hidden_layers - len(model.mlp_only_layers)), dtype=head.dtype)
    found: dict[str, list[float]] = {"reduce": [], "reduce without": []}
    engine.confirm()
    for number in range(2 * _REDUCES):
        began_s = time.perf_counter()
        if number % 2:
            votes = head.new_tensor([float(engine.applied == number), 0.0])
            engine._agree(torch.cat([head, votes, counts]))
        else:
            engine._agree(torch.cat([head, counts]))
        found["reduce" if number % 2 else "reduce without"].append(time.perf_counter() - began_s)
    return found
