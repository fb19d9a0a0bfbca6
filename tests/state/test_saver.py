"""Does a rank write what its boxes held when it was asked to, and hear of it when storage refuses?"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from concertina.errors import CheckpointError
from concertina.layout import Box
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import Part, checkpoint_folder, commit, partial_folder, verify
from concertina.state.saver import Saver

pytestmark = pytest.mark.unit

SHAPE = (64, 33)


class Told:
    """What the saver reports, and a gate that holds its thread at the first report."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Part]] = []
        self.facts: list[dict[str, Any]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, step: int, part: Part, facts: dict[str, Any]) -> None:
        assert self.gate.wait(30)
        self.facts.append(facts)
        self.parts.append((step, part))
        self.threads.add(threading.current_thread().name)


def state(weight: torch.Tensor) -> dict[str, BoxedTensor]:
    return {"master/w": BoxedTensor(weight, Box.whole(SHAPE), SHAPE)}


def written(root: Path, step: int) -> torch.Tensor:
    """What a checkpoint of that step, completed now, holds."""
    assert commit(root, step, 0, {}) is not None
    verify(checkpoint_folder(root, step))
    found = torch.full(SHAPE, torch.nan)
    load_boxes(checkpoint_folder(root, step), state(found))
    return found


def test_it_writes_in_the_background_and_says_when_it_is_done(tmp_path: Path) -> None:
    told = Told()
    saver = Saver(tmp_path, 0, 1, 0, told)
    saver.start(10, state(torch.ones(SHAPE)), {"tokens": 640})
    saver.wait()
    ((step, part),) = told.parts
    assert told.facts == [{"tokens": 640}]
    assert (step, part.rank, part.world, part.generation) == (10, 0, 1, 0)
    assert part.boxes == {"master/w": ((0, 0), SHAPE)}
    assert told.threads == {"checkpoint-10"}
    assert torch.equal(written(tmp_path, 10), torch.ones(SHAPE))


def test_later_updates_in_place_do_not_reach_the_file(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE)
    before = weight.clone()
    saver = Saver(tmp_path, 0, 1, 0, Told())
    saver.start(10, state(weight), {})
    weight.fill_(7.0)  # the next step
    saver.wait()
    assert torch.equal(written(tmp_path, 10), before)


def test_a_piece_of_a_longer_segment_is_written_alone(tmp_path: Path) -> None:
    segment = torch.arange(5.0 + 64 * 33)
    saver = Saver(tmp_path, 0, 1, 0, Told())
    saver.start(10, state(segment[3:-2].view(SHAPE)), {})
    saver.wait()
    assert torch.equal(written(tmp_path, 10), segment[3:-2].view(SHAPE))
    assert verify(checkpoint_folder(tmp_path, 10)).bytes < 2 * 4 * 64 * 33


def test_the_parts_of_ranks_that_are_lost_are_written_beside_its_own(tmp_path: Path) -> None:
    told, halves = Told(), torch.randn(SHAPE)
    boxes = [Box((0, 0), (32, 33)), Box((32, 0), SHAPE)]
    first, second = ({"master/w": BoxedTensor(halves[box.slices()], box, SHAPE)} for box in boxes)
    saver = Saver(tmp_path, 1, 2, 0, told)
    saver.start(10, second, {})
    saver.wait()
    assert commit(tmp_path, 10, 0, {}) is None
    saver.start(10, second, {}, {0: first})
    saver.wait()
    assert [part.rank for _, part in told.parts] == [1, 1, 0]
    assert torch.equal(written(tmp_path, 10), halves)


def test_one_step_at_a_time(tmp_path: Path) -> None:
    told = Told()
    told.gate.clear()
    saver = Saver(tmp_path, 0, 1, 0, told)
    saver.start(10, state(torch.zeros(SHAPE)), {})
    second = threading.Thread(target=saver.start, args=(20, state(torch.ones(SHAPE)), {}))
    second.start()
    assert told.parts == []
    assert not partial_folder(tmp_path, 20, 0).exists(), "the second waits for the first"
    told.gate.set()
    second.join(30)
    saver.wait()
    assert [step for step, _ in told.parts] == [10, 20]


def test_waiting_for_nothing_and_waiting_twice(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 0, 1, 0, Told())
    saver.wait()
    saver.start(10, state(torch.zeros(SHAPE)), {})
    saver.wait()
    saver.wait()


def test_a_write_that_hangs_is_an_error_after_the_bound(tmp_path: Path) -> None:
    told = Told()
    told.gate.clear()
    saver = Saver(tmp_path, 0, 1, 0, told)
    saver.start(10, state(torch.zeros(SHAPE)), {})
    with pytest.raises(CheckpointError, match=f"{tmp_path}: writing took more than 0 s"):
        saver.wait(timeout_s=0.05)
    told.gate.set()
    saver.wait()


# -- storage refuses ---------------------------------------------------------------------------------------------------


def refuse(root: Path, how: str) -> str:
    """Make step 10 unwritable for rank 0; words of the cause."""
    folder = partial_folder(root, 10, 0)
    if how == "a file in the way":
        folder.parent.mkdir()
        folder.write_text("")
        return "File exists"
    if how == "the root is a file":
        root.write_text("")
        return "Not a directory"
    folder.mkdir(parents=True)
    if how == "a folder that cannot be written":
        (folder / "shard-00001-model-00001-of-00001.safetensors").mkdir()
        return "Is a directory"
    assert how == "a full disk"
    (folder / "shard-00001-model-00001-of-00001.safetensors").symlink_to("/dev/full")
    return "No space left on device"


@pytest.mark.parametrize(
    "how", ["a file in the way", "the root is a file", "a folder that cannot be written", "a full disk"]
)
def test_a_checkpoint_that_cannot_be_written_is_told_and_never_complete(tmp_path: Path, how: str) -> None:
    told, root = Told(), tmp_path / "checkpoints"
    cause = refuse(root, how)
    saver = Saver(root, 0, 1, 0, told)
    saver.start(10, state(torch.zeros(SHAPE)), {})
    with pytest.raises(CheckpointError, match=cause) as caught:
        saver.wait()
    assert str(root) in str(caught.value)
    assert told.parts == []
    if root.is_dir():
        assert commit(root, 10, 0, {}) is None
    saver.wait()  # told once


def test_whatever_goes_wrong_the_part_is_not_taken_for_written(tmp_path: Path) -> None:
    """Its folder was removed under it, say: also what is our own mistake must not end the thread in silence."""

    def refuse(step: int, part: Part, facts: dict[str, Any]) -> None:
        raise AssertionError("rank 0 wrote 0 files")

    saver = Saver(tmp_path, 0, 1, 0, refuse)
    saver.start(10, state(torch.zeros(SHAPE)), {})
    with pytest.raises(CheckpointError, match="could not write: AssertionError: rank 0 wrote 0 files"):
        saver.wait()


def test_after_a_failure_the_next_step_is_written(tmp_path: Path) -> None:
    told, root = Told(), tmp_path / "checkpoints"
    refuse(root, "a full disk")
    saver = Saver(root, 0, 1, 0, told)
    saver.start(10, state(torch.zeros(SHAPE)), {})
    with pytest.raises(CheckpointError):
        saver.start(20, state(torch.zeros(SHAPE)), {})
    saver.start(20, state(torch.ones(SHAPE)), {})
    saver.wait()
    assert [step for step, _ in told.parts] == [20]
    assert torch.equal(written(root, 20), torch.ones(SHAPE))
