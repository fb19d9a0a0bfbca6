"""Some nodes do not reach each other, and the coordinator reaches all: who goes? As few as possible, by links alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Link", "to_leave_out"]

Link = frozenset[str]
"""Two nodes, either of which cannot open a connection to the other."""


def to_leave_out(nodes: Sequence[str], cut: Collection[Link]) -> list[str]:
    """Nodes without which all that are left reach each other: again and again the one that misses most others, of those
    alike the last in `nodes`, which has those first that should stay."""
    left, gone = {link for link in cut if link <= set(nodes)}, []
    while left:
        missing = {node: sum(node in link for link in left) for node in nodes}
        worst = max(reversed(nodes), key=lambda node: missing[node])
        gone.append(worst)
        left = {link for link in left if worst not in link}
    return gone
