"""Is a product the same from either library, for views and odd shapes, and does a window hold the rows asked for?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concertina.model.product import ROW_QUANTUM, product, row_window, uses_onednn
from tests.model.errors import error

pytestmark = pytest.mark.unit

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_product_is_x_times_w_transposed(dtype: torch.dtype, rows: int, transposed: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, 20).to(dtype), torch.randn(9, 20).to(dtype)
    x, w = (t.t().contiguous().t() if turned else t for t, turned in zip((x, w), transposed, strict=True))
    expected = x.to(torch.float64) @ w.to(torch.float64).t()
    assert product(x, w).dtype == dtype
    assert error(product(x, w).to(torch.float64), expected) < TOLERANCE[dtype]


def test_rows_of_a_slice() -> None:
    x, w = torch.randn(40, 8), torch.randn(5, 8)
    assert error(product(x[3:9], w), x[3:9] @ w.t()) < 2e-6


@given(st.integers(1, 200), st.data())
def test_window_holds_the_rows_and_stays_inside(rows: int, data: st.DataObject) -> None:
    start, stop = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
    x = torch.empty(rows, 1)
    low, high = row_window(start, stop, x)
    assert 0 <= low <= start <= stop <= high <= rows
    if uses_onednn(x) and start < stop:
        assert (high - low) % ROW_QUANTUM == 0 or high - low == rows
    assert high - low < stop - start + ROW_QUANTUM


def test_float64_never_leaves_torch() -> None:
    assert not uses_onednn(torch.empty(1, dtype=torch.float64))
