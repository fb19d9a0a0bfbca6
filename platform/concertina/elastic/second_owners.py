"""Which rank keeps the second copy of each rank's state?

One in another failure domain (a node), so that the loss of a domain leaves every piece with an owner. Domains are
paired and hold each other's copies: two losses are then fatal only when they hit both of a pair, n/2 of the
n(n-1)/2 combinations. A ring, where each domain has its copies on the next, has n of them. GEMINI (SOSP 2023) places
groups of mutual copies, and a ring where machines are left over, for the same reason; Lazarus' maximum rank overlap is
the like for replicas of experts (arXiv 2407.04656).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, product

__all__ = ["place_seconds"]


def place_seconds(nodes: Sequence[str]) -> tuple[int | None, ...]:
    """The rank that owns the second copy of each rank's pieces; `nodes[rank]` is the rank's failure domain.

    With one domain only it is another rank of it, with one rank only nobody. Domains of like size are paired, and an
    odd one out makes a ring of three. No rank then has more seconds than its domain's partners have ranks for each of
    its own, rounded up: one where all domains are of one size.
    """
    domains: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        domains.setdefault(node, []).append(rank)
    if len(domains) == 1:
        world = len(nodes)
        return tuple((rank + 1) % world if world > 1 else None for rank in range(world))
    order = sorted(domains.values(), key=lambda ranks: (-len(ranks), ranks[0]))
    seconds: list[int | None] = [None] * len(nodes)
    loads = [0] * len(order)
    for giver, taker in _partners(tuple(map(len, order))):
        for rank in order[giver]:  # the taker's ranks in turn, from where the last giver's stopped
            seconds[rank] = order[taker][loads[taker] % len(order[taker])]
            loads[taker] += 1
    return tuple(seconds)


def _partners(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(domain, the domain that holds its copies) of each; `sizes` descend. Neighbours are paired."""
    triple = _triple(sizes) if len(sizes) % 2 else len(sizes)
    for first in [*range(0, triple, 2), *range(triple + 3, len(sizes), 2)]:
        yield first, first + 1
        yield first + 1, first
    if triple < len(sizes):
        for giver, taker in _among_three(sizes[triple : triple + 3])[1].items():
            yield triple + giver, triple + taker


def _triple(sizes: tuple[int, ...]) -> int:
    """Where the three domains that are no pairs stand: where the largest load of a rank is least, late if equal."""
    before = [0, *accumulate((_load(sizes[i], sizes[i + 1]) for i in range(0, len(sizes) - 1, 2)), max)]
    after = [0, *accumulate((_load(sizes[i - 1], sizes[i]) for i in range(len(sizes) - 1, 0, -2)), max)]
    places = range(0, len(sizes) - 2, 2)

    def largest(place: int) -> tuple[int, int]:
        worst, _ = _among_three(sizes[place : place + 3])
        return max(worst[0], before[place // 2], after[(len(sizes) - 3 - place) // 2]), worst[1]

    return min(reversed(places), key=largest)


@lru_cache(maxsize=1024)
def _among_three(sizes: tuple[int, int, int]) -> tuple[tuple[int, int], Mapping[int, int]]:
    """(largest load of a rank, fatal pairs) and who holds whose copies among three domains: mostly a ring.

    Where one of the three is small, a ring would lay all of a large domain on it; a pair with a third is better then.
    """
    others = [(1, 2), (0, 2), (0, 1)]

    def cost(takers: tuple[int, ...]) -> tuple[int, int]:
        given = [sum(size for size, taker in zip(sizes, takers, strict=True) if taker == d) for d in range(3)]
        fatal = {frozenset((giver, taker)) for giver, taker in enumerate(takers)}
        return max(_load(given[d], sizes[d]) for d in range(3)), len(fatal)

    best = min(product(*others), key=cost)
    return cost(best), dict(enumerate(best))


def _load(copies: int, ranks: int) -> int:
    """Copies that the busiest of `ranks` has."""
    return -(-copies // ranks)
