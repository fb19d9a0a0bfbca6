"""Do stages that wait have a bubble to measure, and does interleaving make the formula's smaller?"""

from __future__ import annotations

import pytest

from benchmarks.pipeline import formula, measure, rows_of


@pytest.mark.unit
def test_rows_stand_beside_their_formula() -> None:
    rows = rows_of({(4, 1): [0.5, 0.44, 0.45], (8, 2): [0.2]})
    assert [(row.name, row.value) for row in rows] == [
        ("4 stages, 4 micro-batches: bubble", 0.45),
        ("4 stages, 4 micro-batches: by the formula", pytest.approx(3 / 7)),
        ("4 stages, 8 micro-batches, 2 pieces each: bubble", 0.2),
        ("4 stages, 8 micro-batches, 2 pieces each: by the formula", pytest.approx(3 / 19)),
    ]
    assert formula(8, 2) < formula(8, 1) < formula(4, 1)


@pytest.mark.dist
def test_a_run_of_few_micro_batches() -> None:
    """On any machine: no less than the formula's, for stages do their work one after the other."""
    ((bubble,),) = measure(1, [(1, 1)]).values()
    assert formula(1, 1) - 0.02 < bubble < 1
