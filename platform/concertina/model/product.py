"""Which library multiplies two matrices? torch.mm, or oneDNN's kernel where it is the faster one.

Measured in fp32 on one core of an AMD EPYC (Zen 4, AVX-512): with operands that are not in cache, as in a model, x w^T
and dy w run at 101 to 106 GFLOP/s in oneDNN and at 90 to 97 in MKL, which torch.mm calls; dy^T x is better left to MKL.
oneDNN prepares a kernel for every shape it meets (0.3 to 1 ms): row counts that change from step to step, the experts',
are rounded up with `row_window`, so that few shapes are met.
The choice depends on nothing but the machine and the dtype, so it is the same in every run. No gradient flows here.
Shapes: M rows, I inner, O out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ROW_QUANTUM", "product", "row_window", "uses_onednn"]

ROW_QUANTUM = 16


@cache
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    information = Path("/proc/cpuinfo")
    vendor = information.read_text() if information.exists() else ""
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def uses_onednn(x: Tensor) -> bool:
    """Whether products of tensors like `x` go to oneDNN."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_faster()


def product(x_MI: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T [M, O]. Either may be a transposed view."""
    if uses_onednn(x_MI) and x_MI.shape[0] > 0:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, w_OI, None, "none", [], "")
        return result
    return torch.mm(x_MI, w_OI.t())


def row_window(start: int, stop: int, x_MI: Tensor) -> tuple[int, int]:
    """(first, last) of the rows of `x` to multiply so that rows start to stop - 1 are among them.

    More than asked for only where a rounded number is faster; what the surplus rows give is thrown away.
    """
    if start == stop or not uses_onednn(x_MI):
        return start, stop
    rows = x_MI.shape[0]
    length = min(rows, -(-(stop - start) // ROW_QUANTUM) * ROW_QUANTUM)
    first = min(start, rows - length)
    return first, first + length
