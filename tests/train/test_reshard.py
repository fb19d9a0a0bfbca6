"""Does a checkpoint written under any layout load under any other, bit for bit?"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from concertina.errors import CheckpointError
from concertina.layout import Box, Layout
from concertina.layout.pieces import pieces
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes, write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from concertina.train.optimizer import KINDS
from tests.train.worlds import seated_engine, tiny_job

pytestmark = pytest.mark.unit

JOB = tiny_job(model={"num_hidden_layers": 2, "attention_bias": True, "qk_norm": "full"})
LAYOUTS = {
    "one": Layout(1),
    "dp5": Layout(5),
    "tp2": Layout(2, tp=2),
    "tp4": Layout(4, tp=4),  # fewer key-value heads than lanes
    "ep3": Layout(3, ep=3),  # eight experts over three
    "ep7": Layout(7, ep=7),
    "etp2": Layout(4, ep=2, etp=2),
    "tp2 ep8": Layout(8, tp=2, ep=8),
    "tp2 ep2 etp2": Layout(8, tp=2, ep=2, etp=2),
    "tp2 ep3 etp2": Layout(6, tp=2, ep=3, etp=2),
    "cp2 tp2 ep4": Layout(8, cp=2, tp=2, ep=4),
    "pp2": Layout(2, pp=2),
    "pp2 cp2 tp2 ep4": Layout(8, pp=2, cp=2, tp=2, ep=4),
}

State = dict[str, BoxedTensor]


def states(layout: Layout) -> list[State]:
    """What every rank of a layout owns: live boxes of engines."""
    return [seated_engine(JOB, layout, rank).state() for rank in range(layout.world)]


def fill(ranks: list[State], seed: int) -> None:
    """Numbers of no pattern: an element that lands anywhere else is another one."""
    generator = torch.Generator().manual_seed(seed)
    for state in ranks:
        for boxed in state.values():
            boxed.piece.copy_(torch.randn(boxed.piece.shape, generator=generator, dtype=boxed.dtype))


def assembled(ranks: list[State]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for state in ranks:
        for key, boxed in state.items():
            empty = torch.full(tuple(boxed.shape), float("nan"), dtype=boxed.dtype)
            whole.setdefault(key, empty)[boxed.box.slices()] = boxed.piece
    return whole


def written(root: Path, ranks: list[State]) -> Path:
    for rank, state in enumerate(ranks):
        write_part(partial_folder(root, 1, 0), state, rank=rank, world=len(ranks), generation=0)
    assert commit(root, 1, 0, {}) is not None
    return checkpoint_folder(root, 1)


def differing(ranks: list[State], whole: dict[str, Tensor]) -> list[str]:
    """Keys of boxes that are not the slice of the whole tensor."""
    return [
        key
        for state in ranks
        for key, boxed in state.items()
        if not torch.equal(boxed.piece, whole[key][boxed.box.slices()])
    ]


def loaded(folder: Path, layout: Layout) -> list[State]:
    ranks = states(layout)
    for state in ranks:
        for boxed in state.values():
            boxed.piece.fill_(float("nan"))
        load_boxes(folder, state)
    return ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_know_which_boxes_an_engine_owns(layout: str) -> None:
    for rank, state in enumerate(states(LAYOUTS[layout])):
        for kind in KINDS:
            owned = {key.removeprefix(f"{kind}/"): b.box for key, b in state.items() if key.startswith(f"{kind}/")}
            assert owned == pieces(JOB.model, LAYOUTS[layout], rank)


def pairs() -> list[tuple[str, tuple[str, str]]]:
    """Every layout writes once, and two others read: each of them twice."""
    names = random.Random(1).sample(list(LAYOUTS), len(LAYOUTS))
    return [(name, (names[index - 1], names[index - 4])) for index, name in enumerate(names)]


@pytest.mark.parametrize(("old", "new"), pairs(), ids=str)
def test_every_box_is_the_slice_of_the_whole(old: str, new: tuple[str, str], tmp_path: Path) -> None:
    writers = states(LAYOUTS[old])
    fill(writers, seed=len(old))
    whole = assembled(writers)
    assert {key.split("/")[0] for key in whole} == set(KINDS)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    folder = written(tmp_path, writers)
    for name in new:
        readers = loaded(folder, LAYOUTS[name])
        assert sum(boxed.piece.numel() for state in readers for boxed in state.values()) == sum(
            tensor.numel() for tensor in whole.values()
        )
        assert differing(readers, whole) == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_element_that_differs_is_seen(kind: str, tmp_path: Path) -> None:
    writers = states(LAYOUTS["etp2"])
    fill(writers, seed=1)
    whole = assembled(writers)
    key = f"{kind}/layers.1.moe.experts.w13"
    writers[-1][key].piece.view(-1)[-1] += 1e-15
    assert set(differing(loaded(written(tmp_path, writers), LAYOUTS["tp2 ep8"]), whole)) == {key}


def test_pieces_that_changed_places_are_seen(tmp_path: Path) -> None:
    writers = states(LAYOUTS["etp2"])
    fill(writers, seed=1)
    whole = assembled(writers)
    key = "master/layers.1.moe.experts.w2"
    first, second = writers[0][key], writers[1][key]
    assert first.box.shape == second.box.shape
    writers[0][key], writers[1][key] = (
        BoxedTensor(first.piece, second.box, tuple(first.shape)),
        BoxedTensor(second.piece, first.box, tuple(first.shape)),
    )
    assert set(differing(loaded(written(tmp_path, writers), LAYOUTS["one"]), whole)) == {key}


def test_a_box_of_the_wrong_place_is_refused(tmp_path: Path) -> None:
    """One row further on, it leaves a gap and covers a neighbour's row."""
    writers = states(LAYOUTS["dp5"])
    key = "exp_avg/head.weight"
    moved = writers[1][key]
    box = Box((moved.box.start[0] + 1, 0), (moved.box.stop[0] + 1, moved.box.stop[1]))
    writers[1][key] = BoxedTensor(moved.piece, box, tuple(moved.shape))
    with pytest.raises(CheckpointError, match="leave gaps or overlap"):
        written(tmp_path, writers)
