"""A generation does not form although nobody is lost: who is left out of the next one, and how often is it tried?

Whoever waits in a collective is late because of another one, and nothing says of which. So nobody is blamed for that.
Members that have not yet formed anything with the others are left out until it works, and come back one at a time: who
is alone when it does not work is to blame.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from concertina.elastic.losses import Loss

__all__ = ["Doubts"]

_WITH_ALL = 2  # tries of a first generation with everybody: the network may have stuttered
_MOST_SAID = 4  # of what members said, in one line
_TO_THOSE_THAT_DIE = "see in logs/ what members die of, above all their memory"
_TO_THOSE_THAT_WAIT = "see that all nodes reach each other on every port, or leave out the one that does not"


@dataclass
class Doubts:
    """Of one session. `proven` have been of a generation that formed; `apart` are left out for now. `tries`:
    generations that were begun for nothing since the run last came to a new step."""

    proven: set[int] = field(default_factory=set)
    apart: set[int] = field(default_factory=set)
    tries: int = 0
    _step: int = -1

    def come_to(self, step: int) -> None:
        """Steps that are done again are no progress."""
        if step > self._step:
            self._step, self.tries = step, 0

    def settle(self, roster: Collection[int]) -> None:
        """They have formed a generation together."""
        self.proven.update(roster)
        self.apart.difference_update(roster)

    def fail(self, nodes: Mapping[int, str], roster: Collection[int], prepared: Collection[int]) -> None:
        """A generation of `roster` for which the world stood still did not come about. `nodes`: of all that are there.

        Who is new and not prepared is left out of the next; then who is new; of a first generation, in which all are
        new, one half of the nodes, then the other, then quarters.
        """
        self.tries += 1
        new = set(roster) - self.proven
        if self.proven.isdisjoint(roster):
            if roster and self.tries > _WITH_ALL:
                self.apart = nodes.keys() - _part(nodes, self.tries - _WITH_ALL - 1)
        else:
            self.apart |= new if self.tries > 1 else new.difference(prepared)

    def refuse(self, roster: Collection[int], prepared: Collection[int]) -> int | None:
        """A planned change did not get ready, and the world goes on. Who is to blame, if that is known."""
        new = set(roster) - self.proven
        missing = new.difference(prepared)
        if len(missing) == 1:
            return missing.pop()
        self.apart |= missing or new
        return None

    def trusted(self, present: Mapping[int, str], guest: int | None = None) -> dict[int, str]:
        """Who takes part, with one of those that are left out."""
        return {member: node for member, node in present.items() if member not in self.apart or member == guest}

    def guest(self, waiting: Collection[int]) -> int | None:
        """Whom of those that wait for a seat, and are left out, to try next by itself."""
        return min(self.apart.intersection(waiting), default=None)

    def verdict(self, losses: Sequence[Loss], failures: Mapping[int, str]) -> str:
        """Why the run ends after so many tries, in one line. `failures`: what members said of the last ones."""
        said = [str(loss) for loss in losses] or [f"member {member}: {text}" for member, text in failures.items()]
        last, rest = "; ".join(said[:_MOST_SAID]) or "nobody said why", len(said) - _MOST_SAID
        more = f" and {rest} more" if rest > 0 else ""
        remedy = _TO_THOSE_THAT_DIE if losses else _TO_THOSE_THAT_WAIT
        text = f"regrouped {self.tries} times, and no step came after step {self._step}; the last time {last}{more}"
        return f"{text}: {remedy}, and resume"


def _part(nodes: Mapping[int, str], number: int) -> set[int]:
    """Members of the first half of the nodes, of the second, of the first quarter, and so on; all, when there are no
    smaller parts."""
    names, parts = sorted(set(nodes.values())), 2
    while number >= parts:
        number, parts = number - parts, 2 * parts
    chosen = set(names[number::parts]) if parts <= len(names) else set(names)
    return {member for member, node in nodes.items() if node in chosen}
