"""Where did every second of every member go? The coordinator's books over a session.

Members say their totals (`Timesheet.totals`) with what they send anyway; the ledger knows by its own clock how long
each has lived, and adds what a member cannot know: the time before its first word, the time after its last one, and
how much of a step was only waiting for somebody who was already dead. What is left unexplained is `other`.

Times are seconds of any one clock; the caller reads it. Not thread-safe: the coordinator asks under its own lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from concertina.elastic.account import TOLERANCE, TRAINING, Account, Bucket

__all__ = ["TOLERANCE", "Account", "Bucket", "Ledger", "Price"]

_CLAIMED = (Bucket.RECOMPUTATION, *TRAINING, Bucket.VALIDATION, Bucket.CHECKPOINT_STALL)
"""Where a member may have stood while it waited for the dead; a voided step and waits come before work."""
_NOTICED = (Bucket.RECONFIGURATION, Bucket.WAITING_FOR_CAPACITY, Bucket.DRAINING)
"""Time here after a fault shows that the member has been told of it: what it then calls a step is the next one."""
_FIRST_WORDS = 8
_HISTORY = 64

Totals = Mapping[Bucket, float]


@dataclass(frozen=True)
class Price:
    """What a node costs, and how many ranks share one."""

    usd_per_node_hour: float | None = None
    ranks_per_node: int = 1

    @property
    def usd_per_rank_hour(self) -> float | None:
        return None if self.usd_per_node_hour is None else self.usd_per_node_hour / max(1, self.ranks_per_node)


@dataclass
class _Claim:
    """This member has at least `seconds` of detection since it said `before`."""

    seconds: float
    before: Totals

    def moves(self, now: Totals) -> dict[Bucket, float]:
        """What to add to each bucket, given the totals now."""
        grown = {bucket: now.get(bucket, 0.0) - self.before.get(bucket, 0.0) for bucket in Bucket}
        left = self.seconds - max(0.0, grown[Bucket.DETECTION])
        moved: dict[Bucket, float] = {}
        for bucket in _CLAIMED:
            taken = min(left, max(0.0, grown[bucket]))
            if taken > 0:
                moved[bucket] = -taken
                moved[Bucket.DETECTION] = moved.get(Bucket.DETECTION, 0.0) + taken
                left -= taken
        return moved

    def is_settled(self, now: Totals) -> bool:
        return any(now.get(bucket, 0.0) > self.before.get(bucket, 0.0) for bucket in _NOTICED)


@dataclass
class _Life:
    """One member, from birth to end."""

    node: str
    born: float
    ended: float | None = None
    lost: bool = False
    words: int = 0
    told: dict[Bucket, float] = field(default_factory=dict)
    told_at: float = 0.0
    unsaid_s: float = 0.0
    """From birth to the beginning of its sheet."""
    inside: Bucket = Bucket.STARTING
    fixed: dict[Bucket, float] = field(default_factory=dict)
    """Moved for good by settled claims; adds up to 0."""
    claims: list[_Claim] = field(default_factory=list)
    history: deque[tuple[float, Totals]] = field(default_factory=lambda: deque(maxlen=_HISTORY))

    def report(self, t: float, totals: Mapping[str, float], inside: str | None) -> None:
        told = {Bucket(name): float(seconds) for name, seconds in totals.items()}
        sum_s = sum(told.values())
        if self.ended is not None or sum_s < sum(self.told.values()):
            return  # an older word that came late
        if not self.words:
            self.born = min(self.born, t - sum_s)  # a restarted coordinator finds members that have lived before
        gap_s = t - self.born - sum_s
        if self.words < _FIRST_WORDS:
            # A word that was long under way does not mean that the sheet began later: the quickest tells best.
            self.unsaid_s = gap_s if not self.words else min(self.unsaid_s, gap_s)
        self.inside = Bucket(inside) if inside else _grown_most(self.told, told)
        self.told, self.told_at, self.words = told, t, self.words + 1
        now = self.settled()
        for claim in [claim for claim in self.claims if claim.is_settled(now)]:
            self.claims.remove(claim)
            self.fixed = _plus(self.fixed, claim.moves(now))
            now = self.settled()
        self.history.append((t, now))

    def settled(self) -> dict[Bucket, float]:
        return _plus(self.told, self.fixed)

    def claimed(self) -> dict[Bucket, float]:
        """What it said, less what claims take of it, the open ones as they stand."""
        found = self.settled()
        for claim in self.claims:
            found = _plus(found, claim.moves(found))
        return found

    def claim(self, t_fault: float, t_detected: float) -> None:
        if self.ended is not None or not self.words:
            return
        before = next((totals for t, totals in reversed(self.history) if t <= t_fault), None)
        self.claims.append(_Claim(t_detected - max(t_fault, self.born), before or {}))

    def seconds(self, t: float) -> dict[Bucket, float]:
        """Its whole life until `t`, every second in a bucket."""
        end = max(self.born, t if self.ended is None else min(t, self.ended))
        if not self.words:
            return {Bucket.STARTING: end - self.born}
        found = self.claimed()
        unexplained_s = self.told_at - self.born - self.unsaid_s - sum(self.told.values())
        tail = Bucket.DETECTION if self.lost and self.inside in _CLAIMED else self.inside
        known = {Bucket.STARTING: max(0.0, self.unsaid_s), Bucket.OTHER: max(0.0, unexplained_s)}
        return _plus(_plus(found, known), {tail: max(0.0, end - self.told_at)})


class Ledger:
    """Books of one session: who lived from when to when, what each said, what each fault took."""

    def __init__(self, t: float, wanted: int, price: Price | None = None) -> None:
        """The session begins at `t` and wants `wanted` ranks."""
        self.price = price or Price()
        self._lives: dict[int, _Life] = {}
        self._wanted: list[tuple[float, int]] = [(t, wanted)]

    # -- what happens -----------------------------------------------------------------------------------------------

    def want(self, t: float, ranks: int) -> None:
        """From `t` on the run wants so many ranks; 0 when it ends."""
        self._wanted.append((t, ranks))

    def born(self, member: int, t: float, node: str) -> None:
        """Its process was asked for. What comes until its first word is `starting`."""
        self._lives[member] = _Life(node, t)

    def report(self, member: int, t: float, totals: Mapping[str, float], inside: str | None = None) -> None:
        """`totals` of its timesheet, and the bucket that ran when it wrote them; without that, the one that grew most.

        Older words that come late and words of strangers and of the dead change nothing.
        """
        if member in self._lives:
            self._lives[member].report(t, totals, inside)

    def lost(self, member: int, t: float) -> None:
        """It is lost, decided at `t`. If it trained when last heard of, the time since then was `detection`."""
        self._end(member, t, lost=True)

    def left(self, member: int, t: float) -> None:
        """It has ended in order; the time since its last word is that of the bucket it was in."""
        self._end(member, t, lost=False)

    def _end(self, member: int, t: float, lost: bool) -> None:
        life = self._lives.get(member)
        if life is not None and life.ended is None:
            # Never before its last word: the two are timed by the same clock, the estimate of a loss is not.
            life.ended, life.lost = max(t, life.told_at), lost

    def fault(self, t_fault: float, t_detected: float) -> None:
        """Something broke at about `t_fault` and was decided on at `t_detected`: whoever trained in between waited,
        known or not. Call it with `lost`, in any order."""
        for life in self._lives.values():
            life.claim(t_fault, t_detected)

    # -- who is known ----------------------------------------------------------------------------------------------

    @property
    def members(self) -> set[int]:
        return set(self._lives)

    @property
    def living(self) -> set[int]:
        return {member for member, life in self._lives.items() if life.ended is None}

    # -- what is known ----------------------------------------------------------------------------------------------

    def account(self, t: float) -> Account:
        """Everything until `t`; the living are taken to be where they last were."""
        seconds: dict[Bucket, float] = {}
        total_s = 0.0
        for life in self._lives.values():
            seconds = _plus(seconds, life.seconds(t))
            total_s += max(0.0, (t if life.ended is None else min(t, life.ended)) - life.born)
        seconds = {bucket: amount for bucket, amount in seconds.items() if amount > 0}
        plain = Account(seconds, total_s, self._missing(t), None, len(self._lives))
        return plain.priced(self.price.usd_per_rank_hour)

    def member(self, member: int, t: float) -> dict[Bucket, float]:
        """One member's seconds until `t`."""
        return self._lives[member].seconds(t)

    def _missing(self, t: float) -> float:
        missing_s = 0.0
        for start, end, wanted, alive in self._stretches(t):
            missing_s += max(0, wanted - alive) * (end - start)
        return missing_s

    def _stretches(self, t: float) -> Iterator[tuple[float, float, int, int]]:
        """(from, to, ranks wanted, members alive) between all moments at which one of the two changed."""
        changes = [(life.born, 1) for life in self._lives.values()]
        changes += [(life.ended, -1) for life in self._lives.values() if life.ended is not None]
        moments = sorted(
            [(at, None, ranks) for at, ranks in self._wanted] + [(at, step, 0) for at, step in changes],
            key=lambda moment: moment[0],
        )
        wanted = alive = 0
        start = self._wanted[0][0]
        for at, step, ranks in moments:
            if at >= t:
                break
            yield start, max(start, at), wanted, alive
            start = max(start, at)
            if step is None:
                wanted = ranks
            else:
                alive += step
        yield start, max(start, t), wanted, alive

    # -- over a restart ---------------------------------------------------------------------------------------------

    def to_json(self, t: float) -> dict[str, Any]:
        """All of it as of `t`, for the journal; times as ages, since a restarted coordinator has another clock.
        What open claims would take now is taken."""
        return {
            "price": [self.price.usd_per_node_hour, self.price.ranks_per_node],
            "wanted": [[t - at, ranks] for at, ranks in self._wanted],
            "lives": {str(member): _life_to_json(life, t) for member, life in self._lives.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], t: float) -> Ledger:
        """The books again. `t` is the moment of `to_json`, on the new clock."""
        ledger = cls(t, 0, Price(*document["price"]))
        ledger._wanted = [(t - age, int(ranks)) for age, ranks in document["wanted"]]
        ledger._lives = {int(member): _life_from_json(life, t) for member, life in document["lives"].items()}
        return ledger


def _life_to_json(life: _Life, t: float) -> dict[str, Any]:
    return {
        "node": life.node,
        "born": t - life.born,
        "ended": None if life.ended is None else t - life.ended,
        "lost": life.lost,
        "words": life.words,
        "told": {bucket.value: seconds for bucket, seconds in life.told.items()},
        "told_at": t - life.told_at,
        "unsaid_s": life.unsaid_s,
        "inside": life.inside.value,
        "fixed": {bucket.value: seconds - life.told.get(bucket, 0.0) for bucket, seconds in life.claimed().items()},
    }


def _life_from_json(saved: Mapping[str, Any], t: float) -> _Life:
    life = _Life(
        node=saved["node"],
        born=t - saved["born"],
        ended=None if saved["ended"] is None else t - saved["ended"],
        lost=saved["lost"],
        words=saved["words"],
        told={Bucket(name): seconds for name, seconds in saved["told"].items()},
        told_at=t - saved["told_at"],
        unsaid_s=saved["unsaid_s"],
        inside=Bucket(saved["inside"]),
        fixed={Bucket(name): seconds for name, seconds in saved["fixed"].items()},
    )
    if life.words:
        life.history.append((life.told_at, life.settled()))
    return life


def _grown_most(before: Totals, now: Totals) -> Bucket:
    return max(now, key=lambda bucket: now[bucket] - before.get(bucket, 0.0), default=Bucket.STARTING)


def _plus(one: Totals, two: Totals) -> dict[Bucket, float]:
    found = dict(one)
    for bucket, seconds in two.items():
        found[bucket] = found.get(bucket, 0.0) + seconds
    return found
