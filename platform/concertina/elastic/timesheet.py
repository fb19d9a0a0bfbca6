"""What did one member do with its time, second by second, as far as it can know itself?

    sheet = Timesheet()                         # begins in `starting`
    sheet.begin_step()                          # productive from here on
    with sheet.spend(Bucket.SNAPSHOT_STALL): ...
    sheet.add(Bucket.EXPOSED_COMMUNICATION, waited_s)
    sheet.end_step()                            # applied; or sheet.void_step(), which enters `detection`

The training thread switches, a supervising thread reads. Seconds are moved, never made: at any moment the totals add
up to the time since the sheet began.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from concertina.elastic.account import TRAINING, Bucket

__all__ = ["Mark", "Timesheet"]

Mark = Mapping[Bucket, float]
"""The totals at some moment, for `void_since`."""


class Timesheet:
    """Totals by bucket, and the one bucket that runs. Every method may be called from any thread.

    A fault is known to nobody when it happens: what a rank spends until it notices counts as its step, and the
    coordinator's `Ledger.fault` moves it to `detection` afterwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._totals: dict[Bucket, float] = dict.fromkeys(Bucket, 0.0)
        self._current = Bucket.STARTING
        self._held = False
        self._since = clock()
        self._step: Mark | None = None
        self._computed_void_s = 0.0

    @property
    def current(self) -> Bucket:
        """The bucket that runs."""
        return self._current

    def enter(self, bucket: Bucket) -> Bucket:
        """From now on time goes to `bucket`; returns the one before."""
        with self._mutex:
            return self._switch(bucket)

    def hold(self, bucket: Bucket) -> None:
        """From now on time goes to `bucket`, whatever is entered, until `let_go`: another thread knows of a wait that
        the training thread has yet to come to."""
        with self._mutex:
            self._held = False
            self._switch(bucket)
            self._held = True

    def let_go(self) -> None:
        """What is entered counts again."""
        with self._mutex:
            self._held = False

    def spend(self, bucket: Bucket) -> _Spell:
        """`with` it, time goes to `bucket`, and afterwards to the one before. What is spent inside is the inner's."""
        return _Spell(self, bucket)

    def add(self, bucket: Bucket, seconds: float) -> float:
        """`seconds` just spent in the current bucket were `bucket`'s, as when waits are measured inside a step.

        Moves at most what the current bucket got since the step began (or ever, outside a step); returns the seconds
        moved.
        """
        with self._mutex:
            current = self._switch(self._current)
            there = self._totals[current] - (self._step[current] if self._step is not None else 0.0)
            moved = max(0.0, min(seconds, there))
            self._totals[current] -= moved
            self._totals[bucket] += moved
            return moved

    # -- steps ------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Productive from now on, for as long as nobody says otherwise."""
        with self._mutex:
            self._switch(Bucket.PRODUCTIVE)
            self._step = self._totals.copy()

    def end_step(self) -> None:
        """The step is applied and stays. What runs goes on running."""
        with self._mutex:
            self._step = None

    def void_step(self, then: Bucket = Bucket.DETECTION) -> float:
        """The step that was begun will not be applied: what went into it until now was recomputation, time from now
        on is `then`'s. Returns the seconds moved; 0 when there is no open step."""
        with self._mutex:
            self._switch(then)
            mark, self._step = self._step, None
            return 0.0 if mark is None else self._void(mark)

    def mark(self) -> Mark:
        """Now, for `void_since`: taken with a checkpoint that a roll-back may return to."""
        with self._mutex:
            self._switch(self._current)
            return self._totals.copy()

    def void_since(self, mark: Mark) -> float:
        """All steps since `mark` are void, because the run rolls back to it. Returns the seconds moved."""
        with self._mutex:
            self._switch(self._current)
            self._step = None
            return self._void(mark)

    def _void(self, mark: Mark) -> float:
        moved = 0.0
        for bucket in TRAINING:
            # After an earlier void a bucket may stand below a mark taken before it.
            spent = max(0.0, self._totals[bucket] - mark[bucket])
            self._totals[bucket] -= spent
            self._computed_void_s += spent if bucket is Bucket.PRODUCTIVE else 0.0
            moved += spent
        self._totals[Bucket.RECOMPUTATION] += moved
        return moved

    # -- reading ----------------------------------------------------------------------------------------------------

    def totals(self) -> dict[str, float]:
        """Seconds since the sheet began, the running stretch included; JSON-able, buckets without time left out."""
        with self._mutex:
            self._switch(self._current)
            return {bucket.value: seconds for bucket, seconds in self._totals.items() if seconds > 0}

    @property
    def computed_s(self) -> float:
        """What has gone into computing steps, those that were voided since included: it never falls."""
        with self._mutex:
            self._switch(self._current)
            return self._totals[Bucket.PRODUCTIVE] + self._computed_void_s

    def _switch(self, bucket: Bucket) -> Bucket:
        now = self._clock()
        before = self._current
        self._totals[before] += now - self._since
        self._since = now
        if not self._held:
            self._current = bucket
        return before


class _Spell:
    """One stay in a bucket."""

    __slots__ = ("_before", "_bucket", "_sheet")

    def __init__(self, sheet: Timesheet, bucket: Bucket) -> None:
        self._sheet, self._bucket = sheet, bucket
        self._before = bucket

    def __enter__(self) -> None:
        self._before = self._sheet.enter(self._bucket)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sheet.enter(self._before)
