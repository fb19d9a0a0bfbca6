"""Is a step over shards torch's AdamW, does decay touch matrices only, and do the boxes of its state tile it all?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from concertina.config import TrainingConfig
from concertina.layout import Box, Layout
from concertina.parallel.groups import Groups
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.train.optimizer import KINDS, ShardedAdamW
from tests.distributed import form, run_distributed
from tests.layout.a_shard import a_shard

TRAINING = TrainingConfig(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, max_grad_norm=0.5)
SHAPES = {"matrix": (5, 3), "norm": (3,), "experts": (3, 2, 4), "row": (1, 7)}
WITHOUT_DECAY = {"norm"}
RATES = [0.0, 0.03, 0.05, 0.05, 0.02, 0.01]


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def gradients(step: int, rank: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


class Model:
    """The sharded optimizer over a few parameters, on one rank of a world."""

    def __init__(self, groups: Groups, dtype: torch.dtype) -> None:
        self.parameters = {name: torch.nn.Parameter(weight) for name, weight in weights(dtype).items()}
        self.groups = groups
        reduced = [
            a_shard(name, Box.whole(shape), "edp" if name == "experts" else "dp_cp", name not in WITHOUT_DECAY)
            for name, shape in SHAPES.items()
        ]
        buckets = make_buckets(dict(self.parameters), reduced, groups, TRAINING.weight_decay)
        self.reducer, self.optimizer = GradientReducer(buckets), ShardedAdamW(buckets, TRAINING)

    def step(self, grads: dict[str, Tensor], rate: float, clip: float | None = None) -> float:
        """Backward, clip to `clip`, apply; this rank's share of the squared norm."""
        self.reducer.arm(last=True)
        for name, parameter in self.parameters.items():
            (parameter * grads[name].to(parameter.dtype)).sum().backward()
        shards = self.reducer.finish()
        squares = self.optimizer.local_sum_of_squares(shards).item()
        scale = 1.0 if clip is None else min(1.0, clip / (squares**0.5 + 1e-6))
        self.optimizer.apply(shards, scale, rate)
        self.optimizer.publish()
        self.optimizer.arrive()
        return squares


class Reference:
    """torch.optim.AdamW with torch's clipping on whole tensors."""

    def __init__(self) -> None:
        self.parameters = {name: torch.nn.Parameter(weight) for name, weight in weights(torch.float64).items()}
        groups = [
            {"params": [self.parameters[name]], "weight_decay": 0.0 if name in WITHOUT_DECAY else TRAINING.weight_decay}
            for name in SHAPES
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(TRAINING.adam_beta1, TRAINING.adam_beta2), eps=1e-6)

    def step(self, grads: dict[str, Tensor], rate: float, clip: float | None = None) -> float:
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip or float("inf"))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        return norm.item() ** 2


def assert_equal(model: Model, reference: Reference, bound: float = 1e-12) -> None:
    for name, expected in reference.parameters.items():
        torch.testing.assert_close(model.parameters[name].double(), expected, rtol=bound, atol=bound, msg=name)


# -- a world of one ----------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_every_step_is_adamws_with_clipping() -> None:
    model, reference = Model(Groups.alone(), torch.float64), Reference()
    for step, rate in enumerate(RATES, 1):
        mine = model.step(gradients(step), rate, clip=TRAINING.max_grad_norm)
        assert mine == pytest.approx(reference.step(gradients(step), rate, clip=TRAINING.max_grad_norm), rel=1e-12)
        assert_equal(model, reference)
    assert model.optimizer.updates == len(RATES)
    for name, parameter in reference.parameters.items():
        state, pieces = reference.adamw.state[parameter], model.optimizer.pieces()
        torch.testing.assert_close(pieces[f"exp_avg/{name}"][1], state["exp_avg"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pieces[f"exp_avg_sq/{name}"][1], state["exp_avg_sq"], rtol=1e-12, atol=1e-12)


@pytest.mark.unit
def test_decay_pulls_matrices_only() -> None:
    model, before = Model(Groups.alone(), torch.float64), weights(torch.float64)
    model.step({name: torch.zeros(shape) for name, shape in SHAPES.items()}, rate=0.5)
    for name, parameter in model.parameters.items():
        factor = 1.0 if name in WITHOUT_DECAY else 1 - 0.5 * TRAINING.weight_decay
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-12, atol=0)


@pytest.mark.unit
def test_updates_set_the_bias_correction_as_a_resume_does() -> None:
    """Moments and count of another optimizer, taken over: the next step is the same."""
    first, second, reference = Model(Groups.alone(), torch.float64), Model(Groups.alone(), torch.float64), Reference()
    for step in (1, 2, 3):
        first.step(gradients(step), 0.05)
        reference.step(gradients(step), 0.05)
    for key, (_, piece) in first.optimizer.pieces().items():
        second.optimizer.pieces()[key][1].copy_(piece)
    second.optimizer.updates = first.optimizer.updates
    second.optimizer.publish()
    second.optimizer.arrive()
    assert_equal(second, reference)
    second.step(gradients(4), 0.05)
    reference.step(gradients(4), 0.05)
    assert_equal(second, reference)


@pytest.mark.unit
def test_bfloat16_weights_are_what_fp32_masters_round_to() -> None:
    model = Model(Groups.alone(), torch.bfloat16)
    for step in range(1, 8):
        model.step(gradients(step), 1e-4)
    pieces = model.optimizer.pieces()
    moved = 0
    for name, parameter in model.parameters.items():
        master = pieces[f"master/{name}"][1]
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.to(torch.bfloat16))
        moved += int((master != parameter).sum())
    assert moved > 20, "small steps are kept where the weights cannot show them"


# -- ranks -------------------------------------------------------------------------------------------------------------


def train_on(rank: int, store: Any, world: int) -> dict[str, Any]:
    """Each rank's gradients are its own; the reference gets their sum."""
    model, reference = Model(form(Layout(world), rank, store), torch.float64), Reference()
    squares = []
    for step, rate in enumerate(RATES, 1):
        ranks = [gradients(step, other) for other in range(world)]
        squares.append((model.step(ranks[rank], rate), 0.0))
        total = {name: torch.stack([grads[name] for grads in ranks]).sum(0) for name in SHAPES}
        squares[-1] = (squares[-1][0], reference.step(total, rate))
        assert_equal(model, reference)
    pieces = {key: (box, piece.numpy().copy()) for key, (box, piece) in model.optimizer.pieces().items()}
    expected = {f"master/{name}": parameter.detach().numpy() for name, parameter in reference.parameters.items()}
    return {"squares": squares, "pieces": pieces, "expected": expected}


@pytest.mark.dist
def test_shards_of_four_ranks_are_one_adamw_and_their_boxes_tile_its_state() -> None:
    ranks = run_distributed(train_on, 4, 4)
    for step in range(len(RATES)):
        mine = sum(found["squares"][step][0] for found in ranks)
        assert mine == pytest.approx(ranks[0]["squares"][step][1], rel=1e-12), "each element counts once in the norm"
    for kind in KINDS:
        for name, shape in SHAPES.items():
            owners, whole = np.zeros(shape, dtype=int), np.zeros(shape)
            for found in ranks:
                box, piece = found["pieces"].get(f"{kind}/{name}", (None, None))
                if box is not None:
                    owners[box.slices()] += 1
                    whole[box.slices()] = piece
            assert (owners == 1).all(), f"{kind}/{name}"
            if kind == "master":
                np.testing.assert_allclose(whole, ranks[0]["expected"][f"master/{name}"], rtol=1e-12, atol=1e-12)
    assert {key.split("/")[0] for found in ranks for key in found["pieces"]} == set(KINDS)
