"""How long does something take on a device, and what can the device do at most?

On a GPU time is what passes between two CUDA events; the host may run ahead. Data are random: zeros draw less power and
run faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from concertina.errors import UserError

__all__ = ["Clock", "clock_of", "peak_flops", "product_flops", "samples"]

Action = Callable[[], Any]

# Dense bf16, datasheets; a name that is part of another stands after it.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
}


class Clock(Protocol):
    """Seconds that an action takes, and those for which it keeps the host busy."""

    def time(self, action: Action) -> tuple[float, float]: ...


class HostClock:
    """Of a CPU: the action is over when it returns."""

    def time(self, action: Action) -> tuple[float, float]:
        start = time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        return seconds, seconds


class EventClock:
    """Of a GPU. The host's share tells whether kernels are launched as fast as they run."""

    def time(self, action: Action) -> tuple[float, float]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        action()
        last.record()
        host = time.perf_counter() - start
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host


def clock_of(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else HostClock()


def samples(clock: Clock, action: Action, rounds: int, warm_up: int) -> list[float]:
    """Seconds of each round."""
    found = [clock.time(action)[0] for _ in range(warm_up + rounds)]
    return found[warm_up:]


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """FLOP/s that MFU is quoted against. None on a CPU; raises UserError for a GPU that is not known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peak in _PEAKS.items():
        if part in name:
            return peak
    raise UserError(f"no datasheet peak known for {name}: pass --peak-tflops, that of dense bfloat16")


def product_flops(clock: Clock, device: torch.device, size: int, rounds: int) -> list[float]:
    """FLOP/s of bf16 products of square matrices: what there is to have. Operands take turns and leave the cache."""
    pairs = [[torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)]

    def products() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    return [len(pairs) * 2.0 * size**3 / seconds for seconds in samples(clock, products, rounds, 2)]
