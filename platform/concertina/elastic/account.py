"""What is an account of time? Seconds of ranks by bucket, against a total that was measured apart, and their price.

Every second of every member of a run is in exactly one bucket, so the buckets add up to the wall clock of all
members. Accounts of sessions add up to the account of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["TOLERANCE", "TRAINING", "Account", "Bucket"]

TOLERANCE = 0.01
"""The buckets miss the wall clock by at most this share, and so much of it may be `other`."""


class Bucket(StrEnum):
    """Where a second of a member went. The order is the order of tables."""

    PRODUCTIVE = "productive"
    """A step that was applied, and whatever of it is in no other bucket."""
    EXPOSED_COMMUNICATION = "exposed_communication"
    """Waiting inside a step for what other ranks send."""
    SNAPSHOT_STALL = "snapshot_stall"
    """Waiting for the exchange with the second owner."""
    CHECKPOINT_STALL = "checkpoint_stall"
    """Waiting for a durable checkpoint."""
    VALIDATION = "validation"
    DETECTION = "detection"
    """From a fault to the moment the coordinator decided on it."""
    RECONFIGURATION = "reconfiguration"
    """From then on until the rank trains again."""
    RECOMPUTATION = "recomputation"
    """Computing a step that was voided later and is, or must be, done again."""
    STARTING = "starting"
    """From a member's birth until it first waits or trains."""
    WAITING_FOR_CAPACITY = "waiting_for_capacity"
    """A living member waits because the run has too few of them."""
    SPARE = "spare"
    """A hot spare waits for a seat."""
    DRAINING = "draining"
    """Leaving: from the last step to the end of the process."""
    OTHER = "other"
    """What a member cannot account for."""


TRAINING = (Bucket.EXPOSED_COMMUNICATION, Bucket.SNAPSHOT_STALL, Bucket.PRODUCTIVE)
"""The buckets of a step that may still be voided."""


@dataclass(frozen=True)
class Account:
    """Seconds by bucket; `total_s` is the members' wall clock by the coordinator's own clock, not the buckets' sum."""

    seconds: Mapping[Bucket, float] = field(default_factory=dict)
    total_s: float = 0.0
    missing_s: float = 0.0
    """Rank-seconds of ranks that the run wanted and did not have. Nobody's time: in no bucket and not in the total."""
    usd_by_bucket: Mapping[Bucket, float] | None = None
    """None where no price is known."""
    members: int = 0
    """How many lived."""

    def of(self, bucket: Bucket) -> float:
        return self.seconds.get(bucket, 0.0)

    def share(self, bucket: Bucket) -> float:
        """Of the total; 0 when there is none yet."""
        return self.of(bucket) / self.total_s if self.total_s > 0 else 0.0

    @property
    def goodput(self) -> float:
        """Productive seconds over all seconds."""
        return self.share(Bucket.PRODUCTIVE)

    @property
    def usd(self) -> float | None:
        return None if self.usd_by_bucket is None else sum(self.usd_by_bucket.values())

    @property
    def imbalance(self) -> float:
        """By which share of the total the buckets' sum misses it, signed."""
        return (sum(self.seconds.values()) - self.total_s) / self.total_s if self.total_s > 0 else 0.0

    @property
    def is_balanced(self) -> bool:
        """Whether every second has its bucket, within the tolerance."""
        return abs(self.imbalance) <= TOLERANCE and self.share(Bucket.OTHER) <= TOLERANCE

    def __add__(self, more: Account) -> Account:
        """Both together. Dollars of a sum are known only where both are; nothing costs nothing."""
        usd: Mapping[Bucket, float] | None = None
        if self.usd_by_bucket is not None and more.usd_by_bucket is not None:
            usd = _sum(self.usd_by_bucket, more.usd_by_bucket)
        elif not more.total_s:
            usd = self.usd_by_bucket
        elif not self.total_s:
            usd = more.usd_by_bucket
        return Account(
            seconds=_sum(self.seconds, more.seconds),
            total_s=self.total_s + more.total_s,
            missing_s=self.missing_s + more.missing_s,
            usd_by_bucket=usd,
            members=self.members + more.members,
        )

    def priced(self, usd_per_rank_hour: float | None) -> Account:
        """The same seconds at this price."""
        usd = None
        if usd_per_rank_hour is not None:
            usd = {bucket: seconds / 3600 * usd_per_rank_hour for bucket, seconds in self.seconds.items()}
        return Account(self.seconds, self.total_s, self.missing_s, usd, self.members)

    def with_voided(self, share: float) -> Account:
        """After a resume did this share of its steps again: that much of their time was not productive after all."""
        if share <= 0:
            return self
        usd = self.usd_by_bucket
        return Account(
            _voided(self.seconds, share),
            self.total_s,
            self.missing_s,
            None if usd is None else _voided(usd, share),
            self.members,
        )

    def to_json(self) -> dict[str, Any]:
        """The data of a `ledger` event."""
        return {
            "seconds": {bucket.value: round(self.seconds[bucket], 6) for bucket in Bucket if bucket in self.seconds},
            "total_s": round(self.total_s, 6),
            "goodput": round(self.goodput, 6),
            "missing_s": round(self.missing_s, 6),
            "members": self.members,
            "usd": self.usd,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Account:
        """What `to_json` gave; a bucket of a newer version counts as other. Raises ValueError, TypeError, KeyError."""
        known = {bucket.value: bucket for bucket in Bucket}
        seconds: dict[Bucket, float] = {}
        for name, value in data["seconds"].items():
            bucket = known.get(name, Bucket.OTHER)
            seconds[bucket] = seconds.get(bucket, 0.0) + float(value)
        usd, told = data.get("usd"), sum(seconds.values())
        by_bucket = None
        if usd is not None:
            rate = float(usd) / told if told > 0 else 0.0
            by_bucket = {bucket: value * rate for bucket, value in seconds.items()}
        missing_s, members = float(data.get("missing_s") or 0.0), int(data.get("members") or 0)
        return cls(seconds, float(data["total_s"]), missing_s, by_bucket, members)


def _sum(one: Mapping[Bucket, float], two: Mapping[Bucket, float]) -> dict[Bucket, float]:
    return {bucket: one.get(bucket, 0.0) + two.get(bucket, 0.0) for bucket in Bucket if bucket in one or bucket in two}


def _voided(amounts: Mapping[Bucket, float], share: float) -> dict[Bucket, float]:
    changed = dict(amounts)
    for bucket in TRAINING:
        moved = changed.get(bucket, 0.0) * min(share, 1.0)
        if moved:
            changed[bucket] -= moved
            changed[Bucket.RECOMPUTATION] = changed.get(Bucket.RECOMPUTATION, 0.0) + moved
    return changed
