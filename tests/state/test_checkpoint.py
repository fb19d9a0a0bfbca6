"""Is a checkpoint complete or absent, checked, and loadable by any cut of the same tensors?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.errors import CheckpointError
from concertina.layout import Box
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes, write_part
from concertina.state.manifest import (
    checkpoint_folder,
    commit,
    discard_after,
    list_checkpoints,
    partial_folder,
    prune,
    read_manifest,
    verify,
)

pytestmark = pytest.mark.unit

SHAPES = {"master/a": (7, 3), "master/b": (5,), "exp_avg/experts": (4, 2, 6)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def pieces(full: dict[str, torch.Tensor], world: int, rank: int, dim: int = 0) -> dict[str, BoxedTensor]:
    found = {}
    for key, tensor in full.items():
        box = Box.whole(tuple(tensor.shape)).cut(min(dim, tensor.dim() - 1), world, rank)
        if box.size:
            found[key] = BoxedTensor(tensor[box.slices()].clone(), box, tuple(tensor.shape))
    return found


def save(root: Path, world: int, step: int = 10, generation: int = 0) -> None:
    for rank in range(world):
        folder = partial_folder(root, step, generation)
        write_part(folder, pieces(tensors(), world, rank), rank=rank, world=world, generation=generation)
    assert commit(root, step, generation, {"note": "test"})


@settings(max_examples=12, deadline=None)
@given(writers=st.integers(1, 6), readers=st.integers(1, 6), dim=st.integers(0, 1))
def test_any_cut_loads_any_cut(writers: int, readers: int, dim: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    save(root, writers)
    for rank in range(readers):
        wanted = pieces({key: torch.zeros(shape) for key, shape in SHAPES.items()}, readers, rank, dim)
        load_boxes(checkpoint_folder(root, 10), wanted)
        for key, boxed in wanted.items():
            assert torch.equal(boxed.piece, tensors()[key][boxed.box.slices()])


def test_absent_until_every_part_is_there(tmp_path: Path) -> None:
    for rank in range(3):
        assert commit(tmp_path, 10, 0, {}) is None
        assert list_checkpoints(tmp_path) == []
        write_part(partial_folder(tmp_path, 10, 0), pieces(tensors(), 3, rank), rank=rank, world=3, generation=0)
    manifest = commit(tmp_path, 10, 0, {"tokens": 5})
    assert manifest is not None
    assert manifest.facts == {"tokens": 5}
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000010"]
    assert verify(checkpoint_folder(tmp_path, 10)) == manifest


def test_a_gap_between_the_boxes_is_refused(tmp_path: Path) -> None:
    folder = partial_folder(tmp_path, 10, 0)
    write_part(folder, pieces(tensors(), 3, 0), rank=0, world=2, generation=0)
    write_part(folder, pieces(tensors(), 3, 1), rank=1, world=2, generation=0)
    with pytest.raises(CheckpointError, match="of 21 elements"):
        commit(tmp_path, 10, 0, {})
    assert list_checkpoints(tmp_path) == []


def test_an_older_generation_does_not_complete_a_newer_one(tmp_path: Path) -> None:
    write_part(partial_folder(tmp_path, 10, 0), pieces(tensors(), 2, 0), rank=0, world=2, generation=0)
    write_part(partial_folder(tmp_path, 10, 1), pieces(tensors(), 2, 1), rank=1, world=2, generation=1)
    assert commit(tmp_path, 10, 0, {}) is None
    assert commit(tmp_path, 10, 1, {}) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 2)
    victim = sorted(checkpoint_folder(tmp_path, 10).glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-4])
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        verify(checkpoint_folder(tmp_path, 10))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = BoxedTensor(torch.zeros(7, 4), Box.whole((7, 4)), (7, 4))
    with pytest.raises(CheckpointError, match=r"\(7, 3\), the model wants \(7, 4\)"):
        load_boxes(checkpoint_folder(tmp_path, 10), {"master/a": other})
    with pytest.raises(CheckpointError, match="no tensor master/z"):
        load_boxes(checkpoint_folder(tmp_path, 10), {"master/z": other})


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, 1, step)
    write_part(partial_folder(tmp_path, 25, 0), pieces(tensors(), 2, 0), rank=0, world=2, generation=0)
    write_part(partial_folder(tmp_path, 35, 0), pieces(tensors(), 2, 0), rank=0, world=2, generation=0)
    prune(tmp_path, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    assert not partial_folder(tmp_path, 25, 0).exists()
    assert partial_folder(tmp_path, 35, 0).exists(), "still being written"


def test_the_same_step_twice_keeps_the_first(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 2, generation=1)
    assert read_manifest(checkpoint_folder(tmp_path, 10)).generation == 0


def test_what_an_earlier_generation_left_half_is_discarded(tmp_path: Path) -> None:
    save(tmp_path, 2)
    write_part(partial_folder(tmp_path, 20, 0), pieces(tensors(), 2, 0), rank=0, world=2, generation=0)
    discard_after(tmp_path, 10)
    assert not partial_folder(tmp_path, 20, 0).exists()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000010"]
