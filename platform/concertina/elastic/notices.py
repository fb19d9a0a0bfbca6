"""Which nodes will go, by when, and when does a run leave them? What is heard goes in, decisions come out.

No clock and no network: the caller says what time it is, on any one clock. A node that will go is *doomed*; who is
there leaves at a step boundary, and keeps the run's speed until then. What is waited for meanwhile: other notices, so
that several become one change, and that this one is taken back, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["UNKNOWN_LEAD_S", "Notice", "NoticeNews", "Notices", "Source"]

UNKNOWN_LEAD_S = 30.0  # what to plan for where nobody says how long there is: Google and Azure give that much
GATHER_S = 6.0  # notices of one wave come seconds apart
LATEST_SHARE = 1 / 3  # of its lead: a node may go before its time, but rarely in the first half
RESERVE_S = 10.0  # before the first deadline: for the last checkpoint of a run that has nowhere to go
RELEASE_S = 5.0  # before a node's own: what is left of the run there ends in order


class Source(StrEnum):
    """Who says that a node will go."""

    AWS = "aws"
    GCP = "gcp"
    AZURE = "azure"
    RAY = "ray"
    """`ray drain-node`, the autoscaler, or a node that was sent SIGTERM."""

    @property
    def may_take_back(self) -> bool:
        """Whether an event may be cancelled before its time."""
        return self is Source.AZURE


@dataclass(frozen=True)
class Notice:
    """One node will go in `left_s` seconds from now. A `hint` says only that it may soon (AWS' rebalance
    recommendation): nobody leaves for that, but nobody new is put there."""

    source: Source
    left_s: float
    text: str = ""
    is_hint: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Notice:
        """What `to_json` gave."""
        return cls(**{**document, "source": Source(document["source"])})


@dataclass(frozen=True)
class NoticeNews:
    """The data of a `notice` event; `str` is its one line. `left_s` is None for one that is taken back."""

    source: Source
    left_s: float | None
    text: str = ""
    is_hint: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NoticeNews:
        """Raises KeyError, ValueError when it is none."""
        left_s = data["left_s"]
        told = None if left_s is None else float(left_s)
        return cls(Source(data["source"]), told, str(data.get("text") or ""), bool(data.get("is_hint")))

    def __str__(self) -> str:
        if self.left_s is None:
            return f"{self.source} takes its notice back"
        what = "may be taken back soon" if self.is_hint else f"is taken back in {self.left_s:.0f} s"
        return f"{what} ({self.source}{f': {self.text}' if self.text else ''})"


@dataclass(frozen=True)
class _Held:
    """What was heard of a node: since when, and until when it is there."""

    notice: Notice
    came_s: float
    deadline_s: float

    @property
    def latest_s(self) -> float:
        """When to leave at last, whatever else there may be to wait for."""
        return self.came_s + (self.deadline_s - self.came_s) * LATEST_SHARE


@dataclass
class Notices:
    """All that is known of the nodes of one session."""

    _held: dict[str, dict[Source, _Held]] = field(default_factory=dict)

    def hear(self, node: str, sources: Collection[Source], found: Collection[Notice], now: float) -> list[NoticeNews]:
        """All that `sources` say of a node at this moment: what they said before and do not say any more is taken
        back. What is new in that."""
        held = self._held.setdefault(node, {})
        news: list[NoticeNews] = []
        for source in sources:
            said = min((n for n in found if n.source is source), key=lambda n: (n.is_hint, n.left_s), default=None)
            before = held.get(source)
            if said is None:
                if before is not None:
                    del held[source]
                    news.append(NoticeNews(source, None))
                continue
            is_new = before is None or (before.notice.is_hint and not said.is_hint)
            came_s = now if before is None or is_new else before.came_s
            held[source] = _Held(said, came_s, now + said.left_s)
            if is_new:
                news.append(NoticeNews(source, said.left_s, said.text, said.is_hint))
        return news

    # -- what is known ------------------------------------------------------------------------------------------------

    def _warnings(self, node: str) -> list[_Held]:
        return [held for held in self._held.get(node, {}).values() if not held.notice.is_hint]

    @property
    def doomed(self) -> frozenset[str]:
        """Nodes that will go."""
        return frozenset(node for node in self._held if self._warnings(node))

    @property
    def avoided(self) -> frozenset[str]:
        """Nodes on which nobody new is put: those that will go, and those that may."""
        return frozenset(node for node, held in self._held.items() if held)

    def deadline_s(self, node: str) -> float | None:
        """When it may be gone; None for one that stays."""
        return min((held.deadline_s for held in self._warnings(node)), default=None)

    # -- what is decided ----------------------------------------------------------------------------------------------

    def is_time_to_leave(self, nodes: Collection[str], now: float) -> bool:
        """Whether who is on these doomed nodes goes now: no other notice has come for a while, or a third of the lead
        of one is over."""
        held = [held for node in nodes for held in self._warnings(node)]
        if not held:
            return False
        return now - max(h.came_s for h in held) >= GATHER_S or now >= min(h.latest_s for h in held)

    def is_last_call(self, nodes: Collection[str], now: float) -> bool:
        """Whether a run that cannot do without one of these nodes must stop now, to leave a checkpoint."""
        held = [held for node in nodes for held in self._warnings(node)]
        return any(now >= max(h.latest_s, h.deadline_s - RESERVE_S) for h in held)

    def is_given_back(self, node: str, now: float) -> bool:
        """Whether those that have left it end there as well: at once, where no notice can be taken back; else, for they
        might return, shortly before it goes."""
        held = self._warnings(node)
        return any(not h.notice.source.may_take_back or now >= h.deadline_s - RELEASE_S for h in held)
