"""Are the choices kept exactly those of a definition written out, on one rank and on several, with many ties?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concertina.config import CapacityConfig, ModelConfig
from concertina.layout import Layout
from concertina.layout.box import cut
from concertina.parallel.capacity import Capacity, Quota, _above_threshold, _bits, _Queues
from concertina.parallel.groups import Group, Groups
from concertina.parallel.lanes import Lanes
from tests.distributed import form, on_ranks

WEIGHTS = (0.0, 1e-45, 1e-40, 0.25, 0.25 + 2**-26, 0.3, 0.5, 0.5, 0.75, 1.0)
"""Few, so that most choices tie; subnormal ones, and two that only the last byte of fp32 tells apart."""


@dataclass(frozen=True)
class Case:
    """All tokens of some groups, with their experts and weights."""

    ids_RK: Tensor
    weights_RK: Tensor
    group_R: Tensor
    num_experts: int
    capacity: int

    def quota(self, by_weight: bool, start: int = 0, stop: int | None = None, sharers: Group | None = None) -> Quota:
        groups = int(self.group_R.max()) + 1 if len(self.group_R) else 1
        here = self.group_R[start:stop]
        return Quota(self.capacity, by_weight, self.num_experts, groups, here, sharers or Group.alone())

    def written_out(self, by_weight: bool) -> Tensor:
        """Python lists: sort each expert's choices of a group, take the first `capacity`."""
        queues: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
        for r, (group, experts) in enumerate(zip(self.group_R.tolist(), self.ids_RK.tolist(), strict=True)):
            for k, expert in enumerate(experts):
                weight = self.weights_RK[r, k].item()
                queues.setdefault((group, expert), []).append((-weight if by_weight else 0.0, r, k))
        kept = torch.zeros_like(self.ids_RK, dtype=torch.bool)
        for queue in queues.values():
            for _, r, k in sorted(queue)[: self.capacity]:
                kept[r, k] = True
        return kept


def drawn(seed: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    experts, tokens, groups = number(1, 6), number(0, 40), number(1, 4)
    k = number(1, experts)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    if number(0, 1):  # everybody wants the first experts
        ids = ids.sort(1).values
    weights = torch.tensor(WEIGHTS, dtype=dtype)[torch.randint(len(WEIGHTS), ids.shape, generator=generator)]
    if number(0, 3) == 0:
        weights = torch.rand(ids.shape, generator=generator, dtype=dtype)
    return Case(ids, weights, torch.arange(tokens) * groups // max(1, tokens), experts, number(1, 12))


dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.mark.unit
@pytest.mark.parametrize("by_weight", [True, False])
@given(seed=st.integers(0, 2**32), dtype=dtypes)
@settings(max_examples=60, deadline=None)
def test_keeps_what_the_definition_keeps(by_weight: bool, seed: int, dtype: torch.dtype) -> None:
    case = drawn(seed, dtype)
    assert torch.equal(case.quota(by_weight).keep(case.ids_RK, case.weights_RK), case.written_out(by_weight))


@pytest.mark.unit
@given(seed=st.integers(0, 2**32), dtype=dtypes)
@settings(max_examples=60, deadline=None)
def test_the_radix_select_keeps_it_too(seed: int, dtype: torch.dtype) -> None:
    case = drawn(seed, dtype)
    queues = _Queues(case.quota(by_weight=True), case.ids_RK)
    kept_N = _above_threshold(_bits(case.weights_RK), queues, case.capacity)
    assert torch.equal(kept_N.view_as(case.ids_RK), case.written_out(by_weight=True))


@pytest.mark.unit
@pytest.mark.parametrize("by_weight", [True, False])
def test_what_is_no_number_is_kept_first_and_no_queue_exceeds_its_capacity(by_weight: bool) -> None:
    """A step gone wrong must reach the judge of anomalies, not end in an index out of range."""
    case = Case(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.zeros(6, dtype=torch.int64), 1, 2)
    case.weights_RK[3:] = torch.tensor([float("nan"), -float("nan"), float("nan")]).view(3, 1)
    expected = [3, 4] if by_weight else [0, 1]
    assert case.quota(by_weight).keep(case.ids_RK, case.weights_RK).nonzero()[:, 0].tolist() == expected
    kept = _above_threshold(_bits(case.weights_RK), _Queues(case.quota(True), case.ids_RK), 2)
    assert kept.nonzero()[:, 0].tolist() == [3, 4]


@pytest.mark.unit
@pytest.mark.parametrize("by_weight", [True, False])
def test_deciding_never_asks_the_host(by_weight: bool) -> None:
    """On a meta device there is nothing to read: any synchronisation would raise."""
    case = drawn(4, torch.float32)
    ids, weights, groups = (tensor.to("meta") for tensor in (case.ids_RK, case.weights_RK, case.group_R))
    quota = replace(case.quota(by_weight), group_R=groups)
    assert quota.keep(ids, weights).shape == ids.shape
    assert _above_threshold(_bits(weights), _Queues(quota, ids), 3).shape == (ids.numel(),)


def on_lanes(rank: int, store: Any, world: int, ignored: bool) -> tuple[int, int]:
    """How many decisions of all cases differ from the definition on this lane's tokens, and how many there are."""
    lanes = form(Layout(world, tp=world), rank, store)["tp"]
    wrong = total = 0
    for seed in range(40):
        case = drawn(seed, torch.float64 if seed % 4 == 0 else torch.float32)
        for by_weight in (True, False):
            start, stop = cut(len(case.ids_RK), world, rank)
            if seed % 3 == 0:  # lanes of any size, empty ones too
                start, stop = [(0, 0), (0, 5), (5, len(case.ids_RK)), (len(case.ids_RK), None)][rank]
            quota = case.quota(by_weight, start, stop, replace(lanes, rank=0) if ignored else lanes)
            kept = quota.keep(case.ids_RK[start:stop], case.weights_RK[start:stop])
            wrong += int((kept != case.written_out(by_weight)[start:stop]).sum())
            total += kept.numel()
    return wrong, total


@pytest.mark.dist
def test_lanes_keep_together_what_one_keeps_alone() -> None:
    found = on_ranks(on_lanes, 4, 4, False)
    assert [wrong for wrong, _ in found] == [0] * 4
    assert sum(total for _, total in found) > 1000


@pytest.mark.dist
def test_the_comparison_sees_ignored_prefix_sums() -> None:
    assert sum(wrong for wrong, _ in on_ranks(on_lanes, 4, 4, True)) > 10


# -- the quota of a micro-batch ----------------------------------------------------------------------------------------


def model(**capacity: Any) -> ModelConfig:
    return ModelConfig(num_experts=8, num_experts_per_tok=2, capacity=CapacityConfig(**capacity))


NAMED = ("tp", "cp", "tp_cp", "etp_ep")


def seat(layout: Layout, rank: int) -> Groups:
    named = {name: Group(name, ranks := layout.group_of(name, rank), ranks.index(rank)) for name in NAMED}
    return Groups(0, layout, Group("world", tuple(range(layout.world)), rank), named)


def quota_of(config: ModelConfig, layout: Layout, rank: int, peers: list[int], replicated: bool = False) -> Quota:
    """Sequences of 6 tokens."""
    groups = seat(layout, rank)
    own = peers[rank // layout.tp]
    capacity = Capacity(config, groups, Lanes(groups["tp"], not replicated))
    return capacity.quota(own, 6, torch.device("cpu"), peers)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("factor", "tokens", "capacity"),
    [(1.0, 8, 2), (1.1, 40, 11), (1.1, 41, 12), (0.1, 4, 1), (2.0, 3, 2), (1.25, 16, 5)],
)
def test_capacity_is_the_ceiling_of_the_share_as_written(factor: float, tokens: int, capacity: int) -> None:
    assert model(factor=factor).expert_capacity(tokens) == capacity


@pytest.mark.unit
def test_groups_are_of_whole_sequences_wherever_lanes_cut() -> None:
    config = model(factor=1.0, group_sequences=2)
    quotas = [quota_of(config, Layout(2, tp=2), rank, [4]) for rank in range(2)]
    assert torch.cat([quota.group_R for quota in quotas]).tolist() == [0] * 12 + [1] * 12
    five = [quota_of(config, Layout(5, tp=5), rank, [4]).group_R for rank in range(5)]
    assert torch.cat(five).tolist() == [0] * 12 + [1] * 12
    for quota in quotas:
        assert (quota.capacity, quota.num_groups, quota.sharers.size) == (3, 2, 2)


@pytest.mark.unit
def test_lanes_with_the_same_tokens_decide_alone() -> None:
    quota = quota_of(model(factor=1.0, pad=True), Layout(2, tp=2, ep=2), 1, [2], replicated=True)
    assert (quota.sharers.size, quota.num_groups, len(quota.group_R)) == (1, 2, 12)
    assert quota.padded == (4, 4)  # two groups of 6 tokens, ceil(6 * 2 / 8) = 2 of each


@pytest.mark.unit
def test_sub_sequences_count_what_a_rank_holds() -> None:
    config = model(factor=1.0, scope="sub_sequence")
    quota = quota_of(config, Layout(2, tp=2), 1, [4])
    assert (quota.capacity, quota.num_groups, quota.sharers.size) == (3, 1, 1)
    assert quota.group_R.tolist() == [0] * 12
    assert quota_of(config, Layout(1), 0, [4]).capacity == 6
    assert quota_of(config, Layout(7, tp=7), 6, [1]).group_R.tolist() == []  # a lane without tokens


@pytest.mark.unit
def test_padding_is_known_from_shapes() -> None:
    """Four ranks: dp 2 (three sequences and one) by tp 2. Capacity 4 of a group of 6 tokens."""
    config, layout = model(factor=2.5, pad=True), Layout(4, tp=2, ep=4)
    assert config.expert_capacity(6) == 4
    # Lanes of the first have 9 tokens each: a whole group and half of one; of the second, half of one.
    expected = (4 + 3, 3 + 4, 3, 3)
    assert [quota_of(config, layout, rank, [3, 1]).padded for rank in range(4)] == [expected] * 4
    local = model(factor=2.5, pad=True, scope="sub_sequence")
    assert quota_of(local, layout, 0, [3, 1]).padded == (6, 6, 2, 2)
