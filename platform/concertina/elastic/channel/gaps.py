"""How long was a member not heard between two heartbeats? Counted, in buckets that grow by a factor.

What is kept does not grow with time: a few hundred counters a member, and the longest gap to the digit. A gap that
never ended, because its member was given up or its connection broke, is in none of them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Any

__all__ = ["Gaps", "GapsByMember"]

_SHORTEST_S = 0.001
_A_DOUBLING = 8
_BUCKETS = 18 * _A_DOUBLING  # up to four minutes: nobody waits for a member that long


class Gaps:
    """A histogram of gaps. A quantile is at most a twelfth too long, and never too short."""

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * _BUCKETS))
        self.longest_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[_bucket(seconds)] += 1
        self.longest_s = max(self.longest_s, seconds)

    def __len__(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Seconds that this share of the gaps did not exceed; 0 without any."""
        wanted = math.ceil(share * len(self))
        for index, count in enumerate(self.counts):
            wanted -= count
            if wanted <= 0:
                return min(_end_s(index), self.longest_s)
        return self.longest_s

    @classmethod
    def together(cls, several: Iterable[Gaps]) -> Gaps:
        """All of them in one."""
        whole = cls()
        for each in several:
            whole.longest_s = max(whole.longest_s, each.longest_s)
            for index, count in enumerate(each.counts):
                whole.counts[index] += count
        return whole

    def to_json(self) -> dict[str, Any]:
        """JSON-able; empty buckets are left out. A bucket ends at `2**((number + 1) / 8)` ms."""
        buckets = {str(index): count for index, count in enumerate(self.counts) if count}
        return {"longest_s": self.longest_s, "buckets": buckets}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Gaps:
        """What `to_json` gave."""
        gaps = cls()
        gaps.longest_s = float(document["longest_s"])
        for index, count in document["buckets"].items():
            gaps.counts[int(index)] = count
        return gaps


class GapsByMember:
    """For every member, apart by whether it trained when it was last heard: only then is its silence judged short.

    One thread adds; any thread may read.
    """

    def __init__(self) -> None:
        self.training: dict[int, Gaps] = {}
        self.busy: dict[int, Gaps] = {}

    def add(self, member: int, training: bool, seconds: float) -> None:
        of_members = self.training if training else self.busy
        gaps = of_members.get(member)
        if gaps is None:
            gaps = of_members[member] = Gaps()
        gaps.add(seconds)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{"training": {member: gaps}, "busy": {member: gaps}}`."""
        return {
            name: {str(member): gaps.to_json() for member, gaps in sorted(of_members.copy().items())}
            for name, of_members in (("training", self.training), ("busy", self.busy))
        }


def _bucket(seconds: float) -> int:
    if seconds <= _SHORTEST_S:
        return 0
    return min(int(_A_DOUBLING * math.log2(seconds / _SHORTEST_S)), _BUCKETS - 1)


def _end_s(bucket: int) -> float:
    return _SHORTEST_S * 2.0 ** ((bucket + 1) / _A_DOUBLING)
