"""What did a rank send, to whom, and when? While a recording runs, every communication leaves a record.

Times are seconds since the epoch, monotonic within a recording. `issued_s`, `wait_began_s` and `wait_ended_s` are the
host's and exact: handed to the backend, blocked in `finish`, going on. The two of the wire depend on the backend:

    gloo   started   as issued: gloo does not tell when one of its threads takes it
           ended     exact, told by that thread; of an exchange gloo tells nothing, it is the end of the wait
    nccl   started   when the stream that issued it got there (a CUDA event, exact); NCCL's own stream may still be busy
                     with the communication before
           ended     exact (a CUDA event on a stream that waits for it); the host's wait only queues, and is short

`sent_bytes` is what must leave the rank, whatever algorithm moves it, for a group of g: all-to-all, the rows of
others; exchange, what is sent; all-gather, g - 1 times the own piece; reduce-scatter, all but the own piece;
all-reduce, 2 (g - 1) / g of the tensor, rounded up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from concertina.parallel.groups import Groups

__all__ = ["Clock", "Kind", "Record", "Tap", "Trace", "bytes_sent", "recording"]

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange", "counts"]
Mark = Callable[[], float]
"""Says when its moment was; of a device, waits until it has come."""


@dataclass(frozen=True)
class Record:
    """One communication of this rank. Times are None of what had not happened when the recording ended."""

    group: str
    kind: Kind
    sent_bytes: int
    issued_s: float
    started_s: float
    ended_s: float | None
    wait_began_s: float | None
    wait_ended_s: float | None

    def to_json(self) -> dict[str, Any]:
        """A row, ready for json.dumps."""
        return asdict(self)


class Clock(Protocol):
    """Tells the time on the host, and marks moments where communication runs."""

    def now(self) -> float: ...

    def mark(self) -> Mark: ...


class _HostClock:
    """Of a backend whose communications run on the host."""

    def __init__(self) -> None:
        self._origin_s = time.time() - time.perf_counter()

    def now(self) -> float:
        return self._origin_s + time.perf_counter()

    def mark(self) -> Mark:
        moment_s = self.now()
        return lambda: moment_s


class _CudaClock(_HostClock):
    """Of NCCL: a moment is when the current stream gets to an event."""

    def __init__(self) -> None:
        super().__init__()
        self._base = self._event()
        self._base.synchronize()
        self._base_s = self.now()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self) -> Mark:
        event = self._event()

        def moment_s() -> float:
            event.synchronize()
            return self._base_s + self._base.elapsed_time(event) / 1e3

        return moment_s


class Tap:
    """Where a group's communications are listened to: `trace` is None unless a recording runs. `waited_s` is how long
    this rank has been blocked in them, over all; where the backend only queues (NCCL) it is short."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.waited_s = 0.0


class _Followed:
    """A backend's work under the eyes of a trace."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self._work, self._clock = work, clock
        self.ended: Mark | None = None
        self.wait_began_s: float | None = None
        self.wait_ended_s: float | None = None
        try:
            work.get_future().add_done_callback(self._end)
        except RuntimeError as error:
            if "not implemented" not in str(error):  # as of gloo's sends and receives
                raise

    def _end(self, _: Any) -> None:
        self.ended = self._clock.mark()

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def wait(self, *timeout: timedelta) -> None:
        if self.wait_began_s is None:
            self.wait_began_s = self._clock.now()
        self._work.wait(*timeout)
        self.wait_ended_s = self._clock.now()


class Trace:
    """Follows communications, by whatever `clock`, and lists their records in the order of issue."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._followed: list[tuple[tuple[str, Kind, int], float, Mark, _Followed]] = []

    def follow(self, group: str, kind: Kind, sent_bytes: int, start: Callable[[], Any]) -> _Followed:
        """Hand a communication over to its backend by `start`; the work that is returned is to be waited for."""
        issued_s, started = self._clock.now(), self._clock.mark()
        followed = _Followed(start(), self._clock)
        self._followed.append(((group, kind, sent_bytes), issued_s, started, followed))
        return followed

    def records(self) -> list[Record]:
        """Of all that was followed; waits for the device to come to the ends."""
        return [
            Record(
                *what,
                issued_s=issued_s,
                started_s=started(),
                ended_s=work.ended() if work.ended is not None else work.wait_ended_s,
                wait_began_s=work.wait_began_s,
                wait_ended_s=work.wait_ended_s,
            )
            for what, issued_s, started, work in self._followed
        ]


@contextmanager
def recording(groups: Groups) -> Iterator[list[Record]]:
    """Record this rank's communications over all its groups; the list is filled when the block ends.

    What is finished after the block has no times of its wait. Not collective: any rank may record alone.
    """
    records: list[Record] = []
    everyone = (groups.world, *groups.by_name.values())
    assert all(group.tap.trace is None for group in everyone), "one recording at a time"
    on_cuda = any(group.backend is not None and group.backend.name() == "nccl" for group in everyone)
    trace = Trace(_CudaClock() if on_cuda else _HostClock())
    for group in everyone:
        group.tap.trace = trace
    try:
        yield records
    finally:
        for group in everyone:
            group.tap.trace = None
    records += trace.records()  # not after a failure: a device may never come to the ends


def bytes_sent(records: Iterable[Record]) -> dict[tuple[str, str], int]:
    """Sums of `sent_bytes` by (group, kind)."""
    sums: dict[tuple[str, str], int] = {}
    for record in records:
        key = (record.group, record.kind)
        sums[key] = sums.get(key, 0) + record.sent_bytes
    return sums
