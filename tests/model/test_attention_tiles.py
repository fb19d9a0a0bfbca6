"""Do tiles of keys, merged, give the attention of the definition: on one rank, over ranks both ways, with documents?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.layout import Layout
from concertina.model import sight as sight_module
from concertina.model.attention import attend, attend_apart
from concertina.model.attention_kernels import FLASH_ON_CPU, WRITTEN_OUT, TileInput
from concertina.model.rope import rotation
from concertina.model.sight import Sight
from concertina.parallel.context import Context
from concertina.parallel.groups import Group
from tests.allocations import recorded
from tests.distributed import form, on_ranks, run_distributed
from tests.model.errors import error

B, N, G, C = 2, 2, 3, 8


def starts(length: int, every: int | None) -> Tensor | None:
    """Documents of `every` tokens in the first sequence, one more in the second."""
    if every is None:
        return None
    position = torch.arange(length)
    return torch.stack([position // n * n for n in (every, every + 1)])


def inputs(length: int, value_width: int = C, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, of whole sequences."""
    generator = torch.Generator().manual_seed(length)
    shapes = (B, length, N, G, C), (B, length, N, C), (B, length, N, value_width), (B, length, N, G, value_width)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, starts_BS: Tensor | None) -> Tensor:
    position = torch.arange(q.shape[1])
    unseen = (position > position.unsqueeze(1)).expand(len(q), -1, -1)
    if starts_BS is not None:
        unseen = unseen | (position < starts_BS.unsqueeze(2))
    scores = torch.einsum("bsngc,btnc->bngst", q, k) / math.sqrt(q.shape[-1])
    shares = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bngst,btnc->bsngc", shares, v)


def with_gradients(function: Any, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Numbers are of order 1; gradients of who sees one key only are zero."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def sight_of(length: int, context: Context, every: int | None = None) -> Sight:
    positions = context.positions(length, torch.device("cpu"))
    return Sight(length, context, rotation(positions, C, 10000.0, torch.float64), starts(length, every))


@pytest.mark.unit
@pytest.mark.parametrize("value_width", [C, 5])
@pytest.mark.parametrize("every", [None, 1, 40, 1000])
@pytest.mark.parametrize("length", [37, 600])
def test_one_rank_gives_the_definition(length: int, every: int | None, value_width: int) -> None:
    *leaves, dout = inputs(length, value_width)
    sight = sight_of(length, Context(Group.alone()), every)
    found = with_gradients(lambda q, k, v: attend_apart(q, k, v, sight), leaves, dout)
    expected = with_gradients(lambda q, k, v: written_out(q, k, v, sight.starts_BS), leaves, dout)
    assert apart(found, expected) < 1e-12


@pytest.mark.unit
def test_tiles_with_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the definition, however they are cut."""
    monkeypatch.setattr(sight_module, "_MASKED_ROWS", 16)
    monkeypatch.setattr(sight_module, "_MASKED_KEYS", 24)
    *leaves, dout = inputs(200)
    sight = sight_of(200, Context(Group.alone()), 70)
    tiles = sight.tiles(((0, 200),))
    assert max(tile.keys.stop - tile.keys.start for tile in tiles if tile.masked) == 24
    assert max(tile.keys.stop - tile.keys.start for tile in tiles) > 24
    found = with_gradients(lambda q, k, v: attend_apart(q, k, v, sight), leaves, dout)
    assert apart(found, with_gradients(lambda q, k, v: written_out(q, k, v, sight.starts_BS), leaves, dout)) < 1e-12


@pytest.mark.unit
def test_a_document_sees_nothing_of_another() -> None:
    """Attention over two documents is that over each alone."""
    q, k, v, _ = (x[:1] for x in inputs(20))
    sight = Sight(20, Context(Group.alone()), rotation(torch.arange(20), C, 1e4, torch.float64), starts(20, 12)[:1])  # type: ignore[index]
    together = attend_apart(q, k, v, sight)
    for part in (slice(0, 12), slice(12, 20)):
        assert error(together[:, part], written_out(q[:, part], k[:, part], v[:, part], None)) < 1e-13


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_width", [C, 5])
@pytest.mark.parametrize(("rows", "keys", "causal"), [(33, 50, False), (40, 40, True)])
def test_both_kernels_agree(
    rows: int, keys: int, causal: bool, value_width: int, masked: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    q, k, v, dout = (
        torch.randn(4, G, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, C), (keys, C), (keys, value_width), (rows, value_width))
    )
    mask = None
    if masked:
        mask = torch.rand(4, rows, keys, generator=generator) > 0.5
        mask[0, 0] = False  # sees nothing
        if causal:
            mask &= torch.ones(rows, keys, dtype=torch.bool).tril()
    x = TileInput(q, k, v, causal, mask)
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    (out, logs), (expected, expected_logs) = (kernel.forward(x) for kernel in (FLASH_ON_CPU, WRITTEN_OUT))
    seen = logs > float("-inf")
    assert torch.equal(seen, expected_logs > float("-inf"))
    assert error(logs[seen], expected_logs[seen]) < bound
    assert error(out, expected) < bound
    # Of a whole in which every query sees something, as its own key at least.
    whole_logs = torch.logaddexp(expected_logs, torch.zeros_like(expected_logs))
    found, wanted = (kernel.backward(x, dout, expected, whole_logs) for kernel in (FLASH_ON_CPU, WRITTEN_OUT))
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < bound


@pytest.mark.unit
def test_scores_are_made_in_fp32_by_both_kernels() -> None:
    """Large ones, which bfloat16 would round by a sixteenth."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (4 * torch.randn(4, G, 40, C, generator=generator).to(torch.bfloat16) for _ in range(3))
    exact = WRITTEN_OUT.forward(TileInput(*(x.to(torch.float64) for x in (q, k, v)), True, None))[1]
    for kernel in (FLASH_ON_CPU, WRITTEN_OUT):
        assert error(kernel.forward(TileInput(q, k, v, True, None))[1].to(torch.float64), exact) < 1e-4


# -- over ranks --------------------------------------------------------------------------------------------------------


def over_ranks(rank: int, store: Any, cp: int, length: int, exchange: str, every: int | None) -> list[Tensor]:
    """Output and gradients of the positions here, by position."""
    context = Context(form(Layout(cp, cp=cp), rank, store)["cp"], exchange)  # type: ignore[arg-type]
    sight = sight_of(length, context, every)
    *leaves, dout = (torch.cat([x[:, a:b] for a, b in context.chunks(length)], 1) for x in inputs(length))
    return with_gradients(lambda q, k, v: attend_apart(q, k, v, sight), leaves, dout)


@pytest.mark.dist
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize(
    ("cp", "length", "every"), [(2, 64, None), (3, 37, None), (4, 64, 9), (4, 9, None), (3, 700, 90)]
)
def test_ranks_give_the_definition(cp: int, length: int, every: int | None, exchange: str) -> None:
    """Nine positions over eight chunks: most are of one position."""
    *leaves, dout = inputs(length)
    expected = with_gradients(lambda q, k, v: written_out(q, k, v, starts(length, every)), leaves, dout)
    for rank, found in enumerate(on_ranks(over_ranks, cp, cp, length, exchange, every)):
        own = Context(Group("cp", tuple(range(cp)), rank)).take
        assert apart(found, [own(x) for x in expected]) < 1e-12


@pytest.mark.unit
def test_plain_sequences_take_the_plain_kernels() -> None:
    q, k, v, _ = inputs(30)
    sight = sight_of(30, Context(Group.alone()))
    kv = torch.stack([k, v], 3)
    tiled = Sight(30, sight.context, sight.turn, torch.zeros(B, 30, dtype=torch.int64))
    assert sight.is_plain
    assert not tiled.is_plain
    assert error(attend(q, kv, sight), attend(q, kv, tiled)) < 1e-13


def peak(rank: int, store: Any, cp: int, length: int, exchange: str) -> int:
    """Bytes that attention allocates at most, forward and backward, one narrow head in fp32."""
    context = Context(form(Layout(cp, cp=cp), rank, store)["cp"], exchange)  # type: ignore[arg-type]
    here = context.sizes(length)[rank]
    sight = Sight(length, context, rotation(torch.arange(here), C, 1e4, torch.float32))
    q, k, v = (torch.randn(1, here, 1, *n, C, requires_grad=True) for n in ((1,), (), ()))
    with recorded() as found:
        attend_apart(q, k, v, sight).sum().backward()
    return found.peak_bytes


@pytest.mark.dist
def test_memory_falls_with_cp() -> None:
    """In a ring no rank ever has more than some pieces. Gathered, it has keys and values of all positions, gradients of
    both, a tile's own gradients of both and one sum of them: seven rows a position, and no scores."""
    length, row = 4096, 4 * C
    ring, gathered = ([max(on_ranks(peak, cp, cp, length, how)) / row for cp in (2, 4)] for how in ("ring", "gather"))
    assert max(rows * cp for rows, cp in zip(ring, (2, 4), strict=True)) < 32 * length
    assert ring[1] < 0.55 * ring[0]
    for some, all_ in zip(ring, gathered, strict=True):
        assert all_ - some < 8 * length


def long_attention(rank: int, store: Any, length: int) -> tuple[int, float]:
    """Bytes at most, and the largest deviation of outputs from those written out, of some queries."""
    context = Context(form(Layout(8, cp=8), rank, store, timeout_s=1200)["cp"])
    assert context.travels_in_ring(length)
    here, generator = context.positions(length, torch.device("cpu")), torch.Generator().manual_seed(0)
    whole = [torch.randn(1, length, 1, *n, C, generator=generator) for n in ((1,), (), ())]
    q, k, v = (x[:, here].clone().requires_grad_() for x in whole)
    sight = Sight(length, context, rotation(here, C, 1e4, torch.float32))
    with recorded() as found:
        out = attend_apart(q, k, v, sight)
        out.square().sum().backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in (q, k, v))
    worst = 0.0
    for row in (0, len(here) // 2, len(here) - 1):
        seen = slice(0, int(here[row]) + 1)
        scores = (whole[1][0, seen, 0] @ whole[0][0, here[row], 0, 0]) / math.sqrt(C)
        worst = max(worst, float((out[0, row, 0, 0] - scores.softmax(0) @ whole[2][0, seen, 0]).abs().max()))
    return found.peak_bytes, worst


@pytest.mark.dist
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_128k_tokens_over_eight_ranks() -> None:
    """One layer's attention, one narrow head, forward and backward; no rank has more than a few pieces of it."""
    length = 128 * 1024
    for peak_bytes, worst in run_distributed(long_attention, 8, length, timeout_s=1500):
        assert worst < 1e-5
        assert peak_bytes < 32 * (length // 8) * 4 * C
