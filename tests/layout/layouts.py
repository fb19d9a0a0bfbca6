"""Which layouts do the property tests draw? Any that fit, small enough for an oracle that tries every rank."""

from __future__ import annotations

from hypothesis import strategies as st

from concertina.layout import Layout

__all__ = ["layouts"]


@st.composite
def layouts(draw: st.DrawFn, most_ranks: int = 512) -> Layout:
    """A fitting layout: the degrees of both grids are drawn as divisors of what their side has left."""
    stage = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 32, 36, 48, 64]))
    pp = draw(st.integers(1, min(6, most_ranks // stage)))

    def divisor(of: int) -> int:
        return draw(st.sampled_from([d for d in range(1, of + 1) if of % d == 0]))

    tp = divisor(stage)
    cp = divisor(stage // tp)
    etp = divisor(stage)
    ep = divisor(stage // etp)
    return Layout(stage * pp, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)
