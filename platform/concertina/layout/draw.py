"""What does a layout look like in a terminal? The same ranks drawn twice, once as each grid sees them.

    attention  pp 1 dp 4 cp 1 tp 1            | parts dp, : parts cp, a space tp
      pp0 dp0-3   | 0 | 1 | 2 | 3 |

    experts    pp 1 edp 2 ep 2 etp 1          | parts edp, : parts ep, a space etp
      pp0 edp0-1  | 0 : 1 | 2 : 3 |

A layout of more than `MOST_RANKS` ranks is drawn as its degrees and the first group of each name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from concertina.layout.axis import ATTENTION, EXPERT, GROUPS, Axis
from concertina.layout.fold import Layout

__all__ = ["draw"]

MOST_RANKS = 64
MOST_COLUMNS = 16
MOST_SHOWN = 8


def draw(layout: Layout) -> str:
    """ASCII lines of at most 100 columns, no colours, without a newline at the end."""
    head = f"{layout.world} ranks in {layout.pp} pipeline stages of {layout.stage}"
    if layout.pp == 1:
        head = f"{layout.world} ranks, no pipeline"
    lines = [head, ""]
    body = _grids(layout) if layout.world <= MOST_RANKS else _groups(layout)
    return "\n".join([*lines, *body])


def _grids(layout: Layout) -> Iterator[str]:
    """Both grids, ranks at the same places in both: only the bars between them differ."""
    yield from _grid(layout, "attention", ATTENTION)
    yield ""
    yield from _grid(layout, "experts", EXPERT)


def _grid(layout: Layout, title: str, axes: Sequence[Axis]) -> Iterator[str]:
    fast, middle, slow, _ = axes
    yield f"{_degrees(layout, title, axes):<40}  | parts {slow}, : parts {middle}, a space {fast}"
    columns = _columns(layout.stage)
    for stage in range(layout.pp):
        for start in range(stage * layout.stage, (stage + 1) * layout.stage, columns):
            stop = min(start + columns, (stage + 1) * layout.stage)
            first, last = layout.coordinate(start, slow), layout.coordinate(stop - 1, slow)
            label = f"pp{stage} {slow}{first}" + (f"-{last}" if last > first else "")
            yield f"  {label:<12}{_row(layout, range(start, stop), axes)}"


def _degrees(layout: Layout, title: str, axes: Sequence[Axis]) -> str:
    return f"{title:<9}  {' '.join(f'{axis} {layout.degree(axis)}' for axis in reversed(axes))}"


def _columns(stage: int) -> int:
    """Ranks on a line: a stage's lines are equally long where that can be."""
    if stage <= MOST_COLUMNS:
        return stage
    even = [n for n in range(MOST_COLUMNS // 2, MOST_COLUMNS + 1) if stage % n == 0]
    return even[-1] if even else MOST_COLUMNS


def _row(layout: Layout, ranks: range, axes: Sequence[Axis]) -> str:
    """One line: before each rank, and after the last, the mark of the slowest axis that moves there."""
    fast, middle, slow, _ = axes
    grid, width = layout.grid(slow), len(str(layout.world - 1))

    def mark(rank: int) -> str:
        if grid.coordinate(rank, fast):
            return " "
        return " : " if grid.coordinate(rank, middle) else " | "

    line = "".join(mark(rank) + str(rank).rjust(width) for rank in ranks)
    return (line + mark(ranks.stop)).strip()


def _groups(layout: Layout) -> Iterator[str]:
    """Degrees, then number, size and first group of each name."""
    yield _degrees(layout, "attention", ATTENTION)
    yield _degrees(layout, "experts", EXPERT)
    yield ""
    for name in GROUPS:
        ranks = layout.group_of(name, 0)
        shown = " ".join(map(str, ranks[:MOST_SHOWN])) + (f" ... {ranks[-1]}" if len(ranks) > MOST_SHOWN else "")
        yield f"  {name:<6}  {layout.world // len(ranks):>6} groups of {len(ranks):>5}  the first: {shown}"
