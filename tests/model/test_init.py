"""Are start values the same under every slicing, well spread, and the ones we have always drawn?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.layout.box import Box
from concertina.model.init import draw_bits, draw_normal, draw_uniform, element_indices, initialize, key_of

pytestmark = pytest.mark.unit

KEY = 1998697148266765589
VALUES = ["-0x1.4180148237c90p-1", "-0x1.acbf2f96f49fcp-2", "-0x1.2f646bb7cb0b8p-3", "0x1.df6e2210a0143p-2"]


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.Tensor:
    return initialize(name, shape, Box.whole(shape), 0.5, seed, torch.empty(shape, dtype=dtype))


def splitmix(key: int, index: int) -> int:
    """The hash in plain unsigned integers."""
    mask = 2**64 - 1
    x = (index * 0x9E3779B97F4A7C15 + key) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_is_splitmix_in_unsigned_arithmetic() -> None:
    index = torch.tensor([0, 1, 2, 77, 2**40, 2**62])
    for key in (0, key_of(5, "a"), key_of(6, "b", 1, 2)):
        assert [bits % 2**64 for bits in draw_bits(key, index).tolist()] == [splitmix(key, i) for i in index.tolist()]


def test_streams_differ_by_every_part_of_the_key() -> None:
    keys = [
        key_of(0, "a"),
        key_of(1, "a"),
        key_of(0, "b"),
        key_of(0, "a", 1),
        key_of(0, "a", 0, 1),
        key_of(0, "a", 1, 0),
    ]
    assert len(set(keys)) == len(keys)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_box_holds_the_same_numbers_as_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    ends = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    box = Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))
    part = initialize("w", shape, box, 0.5, 3, torch.empty(box.shape, dtype=torch.float64))
    assert torch.equal(part, whole("w", shape)[box.slices()])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole("w", (13, 11))
    monkeypatch.setattr("concertina.model.init._CHUNK_ELEMENTS", 10)
    assert torch.equal(whole("w", (13, 11)), expected)


def test_indices_are_row_major() -> None:
    assert element_indices((4, 5), Box((1, 2), (3, 4)), "cpu").tolist() == [[7, 8], [12, 13]]


def test_lower_precisions_round_the_same_draw() -> None:
    exact = whole("w", (64, 64))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(whole("w", (64, 64), dtype), exact.to(dtype))


def test_normal_has_the_moments_of_one() -> None:
    x = draw_normal(key_of(0, "moments"), torch.arange(1 << 20))
    assert abs(x.mean().item()) < 0.004
    assert abs(x.std().item() - 1) < 0.003
    assert abs((x**4).mean().item() - 2.85) < 0.03  # 3 - 6 / 5 / 8: a sum of eight uniforms
    assert x.abs().max().item() < 4.9
    neighbours = (x[:-1] * x[1:]).mean().item()
    assert abs(neighbours) < 0.004


def test_uniform_fills_the_unit_interval() -> None:
    x = draw_uniform(key_of(0, "uniform"), torch.arange(1 << 16))
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert abs(x.mean().item() - 0.5) < 0.01


def test_the_numbers_never_change() -> None:
    """A changed draw would silently break resuming and comparing runs of different versions."""
    assert key_of(0, "embedding.weight") == KEY
    assert [value.hex() for value in whole("embedding.weight", (2, 2), seed=0).flatten().tolist()] == VALUES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_bits() -> None:
    on_gpu = initialize("w", (300, 70), Box.whole((300, 70)), 0.02, 1, torch.empty(300, 70, device="cuda"))
    on_cpu = initialize("w", (300, 70), Box.whole((300, 70)), 0.02, 1, torch.empty(300, 70))
    assert torch.equal(on_gpu.cpu(), on_cpu)
