"""How does the ledger get into a run's events, and how is it read back over all sessions?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from concertina.elastic.account import Account
from concertina.elastic.ledger import Ledger
from concertina.track.events import Event, EventLog, EventType, void_after

__all__ = ["LEDGER_EVERY_S", "LedgerTally", "LedgerWriter"]

LEDGER_EVERY_S = 30.0
"""What a coordinator that is killed for good takes with it."""


class LedgerWriter:
    """Writes `ledger` events: at once where asked to, and now and then in between."""

    def __init__(
        self,
        log: EventLog,
        ledger: Ledger,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = LEDGER_EVERY_S,
    ) -> None:
        """`clock` is the one that the ledger's times come from."""
        self._log, self._ledger, self._clock, self._every_s = log, ledger, clock, every_s
        self._written = clock()

    def write(self, generation: int, step: int) -> Account:
        """Now: when the membership has changed, and at the end of the session, before its last state."""
        account = self._ledger.account(self._clock())
        self._log.append(EventType.LEDGER, account.to_json(), generation=generation, step=step)
        self._written = self._clock()
        return account

    def look(self, generation: int, step: int) -> Account | None:
        """Write if the last one is long enough ago."""
        return self.write(generation, step) if self._clock() - self._written >= self._every_s else None


@dataclass
class _Session:
    """One session as far as its events tell. `earlier` is what a coordinator wrote that came back without its books."""

    account: Account = field(default_factory=Account)
    earlier: Account = field(default_factory=Account)
    step_s: float = 0.0
    voided_s: float = 0.0

    def take(self, account: Account) -> None:
        if account.total_s < self.account.total_s:
            # Time does not run backwards: these are new books.
            self.earlier += self.account
        self.account = account

    def total(self) -> Account:
        share = self.voided_s / self.step_s if self.step_s > 0 else 0.0
        return (self.earlier + self.account).with_voided(share)


@dataclass
class LedgerTally:
    """Grows event by event. Sessions add up; of a session whose steps were done again by a later one, the same share
    of its time in steps becomes recomputation. (A roll-back inside a session is in its members' own books.)"""

    _sessions: list[_Session] = field(default_factory=list)
    _steps: dict[int, tuple[int, float]] = field(default_factory=dict)
    """step -> the session that did it, and how long it took."""
    _seen: bool = False

    def add(self, event: Event) -> None:
        if event.type == EventType.START or not self._sessions:
            self._sessions.append(_Session())
        kept = void_after(event)
        if kept is not None:
            self._void(kept)
        if event.type == EventType.STEP and event.step is not None:
            self._step(event.step, float(event.data.get("step_s") or 0.0))
        elif event.type == EventType.LEDGER:
            try:
                account = Account.from_json(event.data)
            except (ValueError, TypeError, KeyError, AttributeError):
                return  # of a version that counts otherwise
            self._sessions[-1].take(account)
            self._seen = True

    def _step(self, step: int, seconds: float) -> None:
        self._steps[step] = (len(self._sessions) - 1, seconds)
        self._sessions[-1].step_s += seconds

    def _void(self, kept: int) -> None:
        newest = len(self._sessions) - 1
        for step in [step for step in self._steps if step > kept]:
            number, seconds = self._steps.pop(step)
            if number == newest:
                self._sessions[number].step_s -= seconds
            else:
                self._sessions[number].voided_s += seconds

    def total(self) -> Account | None:
        """The run's account; None when nothing of it was ever written."""
        if not self._seen:
            return None
        total = Account()
        for session in self._sessions:
            total += session.total()
        return total
