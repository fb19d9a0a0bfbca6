"""Is a second copy the first one to the bit, whatever the number of threads, after any number of updates?"""

from __future__ import annotations

import pytest
import torch

from concertina.layout import Layout, segments
from concertina.train.adamw import FlatAdamW
from tests.train.worlds import seated_engine, tiny_job

pytestmark = pytest.mark.unit

LAYOUTS = [Layout(4), Layout(4, tp=2, ep=4), Layout(4, tp=4, etp=2), Layout(6, tp=2, ep=3, etp=2), Layout(3, ep=3)]
JOB = tiny_job(model={"attention_bias": True, "qk_norm": "full"})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_segments_by_plan_are_those_of_a_ranks_buckets(layout: Layout) -> None:
    for rank in range(layout.world):
        engine = seated_engine(JOB, layout, rank)
        planned = segments(JOB.model, layout, rank)
        assert planned == engine.optimizer.segments
        assert [bucket.weight_decay > 0 for bucket in engine.reducer.buckets] == [each.decay for each in planned]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_second_copies_are_equal_to_the_bit_with_any_number_of_threads(precision: torch.dtype) -> None:
    """Long enough that torch does cut the work, and of lengths that no vector divides."""
    job = tiny_job(model={"hidden_size": 136, "vocab_size": 1009, "moe_intermediate_size": 130})
    mine = segments(job.model, Layout(2, ep=2), 1)
    generator, threads = torch.Generator().manual_seed(1), torch.get_num_threads()
    masters = [torch.randn(each.length, generator=generator, dtype=precision) for each in mine]
    assert max(map(len, masters)) > 1 << 17
    assert any(len(master) % 16 for master in masters)
    copies = [FlatAdamW(mine, [master.clone() for master in masters], job.training) for _ in range(3)]
    try:
        for step in range(1, 30):
            gradients = [torch.randn(each.length, generator=generator, dtype=precision) for each in mine]
            for number, copy in enumerate(copies, 1):
                torch.set_num_threads(number)
                copy.apply([gradient.clone() for gradient in gradients], 0.3, 1e-3 * step)
    finally:
        torch.set_num_threads(threads)
    first = copies[0].pieces()
    for copy in copies[1:]:
        for key, (box, piece) in copy.pieces().items():
            assert box == first[key][0]
            assert torch.equal(piece, first[key][1]), key
