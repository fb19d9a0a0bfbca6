"""Do stages that wait have a bubble to measure, and does interleaving make the formula's smaller?"""

from __future__ import annotations

import pytest

from benchmarks.pipeline import Shares, formula, measure, rows_of


@pytest.mark.unit
def test_rows_stand_beside_their_formula() -> None:
    rows = rows_of({(4, 1): [Shares(0.5, 0.6), Shares(0.44, 0.5), Shares(0.45, 0.7)], (8, 2): [Shares(0.2, 0.3)]})
    assert [(row.name, row.value) for row in rows] == [
        ("4 stages, 4 micro-batches: bubble", 0.45),
        ("4 stages, 4 micro-batches: by the formula", pytest.approx(3 / 7)),
        ("4 stages, 4 micro-batches: all that is no product", 0.6),
        ("4 stages, 8 micro-batches, 2 pieces each: bubble", 0.2),
        ("4 stages, 8 micro-batches, 2 pieces each: by the formula", pytest.approx(3 / 19)),
        ("4 stages, 8 micro-batches, 2 pieces each: all that is no product", 0.3),
    ]
    assert formula(8, 2) < formula(8, 1) < formula(4, 1)


@pytest.mark.dist
def test_a_run_of_few_micro_batches() -> None:
    """On any machine: no less than the formula's, for stages do their work one after the other."""
    ((shares,),) = measure(1, [(1, 1)]).values()
    assert formula(1, 1) - 0.02 < shares.no_product < 1
    assert 0 < shares.blocked < shares.no_product
