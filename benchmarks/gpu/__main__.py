"""python -m benchmarks.gpu -o FILE: how fast do blocks of published models train on one GPU, where does the time go,
and against whom?

Forward, backward and optimizer of as many blocks as fit, bf16, with the routing that random weights give to tokens that
have something in common, and with a balanced one; no embedding, no head, no Ray. MFU is of the datasheet's peak (or
--peak-tflops). Time is the median of rounds after a warm-up, by CUDA events. Shares are of parts timed alone.
Without a GPU it walks the same way with toys, and judges nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import UserError

__all__ = ["main", "measure"]

T = TypeVar("T")
WHY = "not looked into yet: see the shares of the parts, and --trace"


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of all shapes, and what is to be known of the device."""
    import torch

    from benchmarks.gpu.clock import clock_of, peak_flops, product_flops
    from benchmarks.gpu.shapes import work_of
    from benchmarks.gpu.stack import stack

    measured_on = stack()
    print(measured_on, file=sys.stderr)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    toy = device.type != "cuda"
    if toy:
        torch.set_num_threads(1)  # tensors this small only lose by threads
    clock, peak = clock_of(device), peak_flops(device, options.peak_tflops)
    products = product_flops(clock, device, 128 if toy else 8192, options.rounds)
    name = "toy: bf16 product of square matrices" if toy else "bf16 product, 8192 x 8192 x 8192"
    rows = [Row.of(name, "TFLOP/s", [each / 1e12 for each in products])]
    facts = {
        "device": "cpu, toy" if toy else torch.cuda.get_device_name(device),
        "toy": toy,
        "stack": measured_on,
        "peak_tflops": peak / 1e12 if peak else None,
        "layers": {},
    }
    for shape in options.shapes:
        work = work_of(shape, options.sequences, options.length, options.micro_batches, toy)
        found, layers = _shape(work, device, clock, peak, median(products), options)
        rows += found
        facts["layers"][work.name] = layers
    return rows, facts


def _shape(
    work: Any, device: Any, clock: Any, peak: float | None, ceiling: float, options: argparse.Namespace
) -> tuple[list[Row], int]:
    """One shape: ours, then theirs, on the same number of layers."""
    import torch

    from benchmarks.gpu.ours import Ours
    from benchmarks.gpu.theirs import Theirs
    from concertina.config import TrainingConfig

    recomputed = TrainingConfig(activation_checkpointing=options.activation_checkpointing).recomputed
    work = _fitted(work, device, options, recomputed)
    rows: list[Row] = []
    ours: dict[str, list[float]] = {}
    for routing in ("real", "balanced"):
        label = f"{work.name}, {work.layers} layers, {routing} routing"

        def measured(contestant: Any, label: str = label, is_real: bool = routing == "real") -> list[float]:
            rates = _rates(work, clock, contestant.step, options)
            rows.extend(_speeds(label, work, rates, peak, ceiling, work.goal if is_real else None))
            if is_real:
                rows.extend(_insight(label, work, clock, contestant, options))
            return rates

        ours[routing] = _alone(partial(Ours, work, device, routing == "balanced", recomputed), measured)
    for kernel, routing in product(options.peers, ours):
        label = f"{work.name}, {work.layers} layers, {routing} routing: transformers {kernel}"
        make = partial(Theirs, work, device, routing == "balanced", kernel)
        try:
            rates = _alone(make, lambda contestant: _rates(work, clock, contestant.step, options))
        except torch.OutOfMemoryError:
            print(f"{label}: out of memory on as many layers as ours, left out", file=sys.stderr)
            continue
        rows.append(Row.of(label, "TFLOP/s", [each / 1e12 for each in rates]))
        rows.append(Row.of(f"{label}, ours against it", "ratio", [each / median(rates) for each in ours[routing]]))
    return rows, work.layers


def _insight(label: str, work: Any, clock: Any, contestant: Any, options: argparse.Namespace) -> Iterator[Row]:
    """What is to be known beside the speed, and the trace if one is wanted."""
    import torch

    yield from _shares(label, work, clock, contestant, options)
    yield Row(f"{label}: busiest expert over the mean", contestant.imbalance(), "ratio")
    if torch.cuda.is_available():
        yield Row(f"{label}: memory at most", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if options.trace is not None:
        _trace(options.trace, work.name, contestant.step)


def _fitted(work: Any, device: Any, options: argparse.Namespace, recomputed: frozenset[str]) -> Any:
    """As many layers as fit, which a first step must show."""
    import torch

    from benchmarks.gpu.ours import Ours
    from benchmarks.gpu.shapes import layers_that_fit, with_layers

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    layers = min(options.layers, layers_that_fit(work, free, options.layers, sorted(recomputed)))
    while True:
        tried = with_layers(work, layers)
        try:
            _alone(partial(Ours, tried, device, False, recomputed), lambda contestant: contestant.step())
            return tried
        except torch.OutOfMemoryError as error:
            if layers == 1:
                text = f"not even one layer of {work.name} fits {free >> 30} GiB: take fewer --sequences"
                raise UserError(f"{text}, or --activation-checkpointing selective") from error
            layers -= 1


def _alone(make: Callable[[], Any], use: Callable[[Any], T]) -> T:
    """One contestant at a time has the device's memory: what the one before left behind goes first, also after it ran
    out of it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return use(make())


def _rates(work: Any, clock: Any, step: Callable[[], None], options: argparse.Namespace) -> list[float]:
    from benchmarks.gpu.clock import samples

    return [work.flops / seconds for seconds in samples(clock, step, options.rounds, options.warm_up)]


def _speeds(
    label: str, work: Any, rates: Sequence[float], peak: float | None, ceiling: float, goal: float | None
) -> list[Row]:
    rows = [Row.of(f"{label}: step", "TFLOP/s", [each / 1e12 for each in rates])]
    tokens = work.tokens * work.micro_batches
    rows.append(Row.of(f"{label}: step", "tokens/s", [each / work.flops * tokens for each in rates]))
    if peak is not None:
        shares = [each / peak for each in rates]
        rows.append(Row.of(f"{label}: MFU", "ratio", shares, goal, reason=WHY, ceiling=ceiling / peak))
    return rows


def _shares(label: str, work: Any, clock: Any, contestant: Any, options: argparse.Namespace) -> list[Row]:
    """Of a step's time, and of the host's."""
    from benchmarks.gpu.clock import samples

    contestant.step()
    whole = median(samples(clock, contestant.step, options.rounds, 1))
    host = median(clock.time(contestant.forward_backward)[1] for _ in range(options.rounds))
    contestant.optimize()
    device = median(samples(clock, contestant.forward_backward, options.rounds, 0))
    contestant.optimize()
    optimizer = max(0.0, whole - device)
    times = {"optimizer": optimizer}
    for name, part in contestant.parts().items():
        times[name] = median(samples(clock, part, options.rounds, 2)) * work.layers * work.micro_batches
    times["norms and the rest"] = max(0.0, whole - sum(times.values()))
    rows = [Row(f"{label}: share of {name}", seconds / whole, "ratio") for name, seconds in times.items()]
    rows.append(Row(f"{label}: forward and backward, without the optimizer", work.flops / device / 1e12, "TFLOP/s"))
    rows.append(Row(f"{label}: host over device, forward and backward", host / device, "ratio"))
    return rows


def _trace(folder: Path, name: str, step: Callable[[], None]) -> None:
    """A step under torch's profiler: the dearest operations on the terminal, all of it in a file."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        step()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"{name}\n{profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)}")
    profile.export_chrome_trace(str(folder / f"{name.replace(' ', '-')}.json"))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    from benchmarks.gpu.shapes import SHAPES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, e.g. benchmarks/results/...")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--layers", type=int, default=4, help="at most so many blocks (default 4)")
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch (default 2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default 4096)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step (default 4)")
    parser.add_argument("--rounds", type=int, default=10, help="default 10")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them (default 3)")
    parser.add_argument("--peers", nargs="*", default=["grouped_mm"], help="transformers' ways (default grouped_mm)")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16; default: the datasheet's")
    parser.add_argument("--trace", type=Path, help="profile a step of ours into this folder")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 1 layer, no peers: a minute on a GPU")
    parser.add_argument("--allow-dirty", action="store_true", help="a trial: measure uncommitted code")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.warm_up, options.layers, options.peers = 3, 2, 1, []
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit code 2 for a dirty tree."""
    options = _options(arguments)
    os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")  # from torch 2.15 on nccl would be another backend than ours
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        rows, facts = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "trace", "allow_dirty")}
    write_result(options.output, {**settings, **facts}, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
