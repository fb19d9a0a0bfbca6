"""Whoever writes is killed, and what is written is spoilt, again and again: is a bad checkpoint ever gone on from, and
is there always a good one?

The writer is a process of its own that goes on from the newest sound checkpoint, as a run does, and prunes as it goes.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

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
    step_of,
)
from concertina.state.sound import newest_sound
from tests.distributed import _context

pytestmark = pytest.mark.unit

SHAPE, WORLD, KEEP = (32, 16), 2, 3
KILLS = 25
DAMAGES = ("flip", "truncate", "remove", "manifest")


def state_at(step: int) -> torch.Tensor:
    """What belongs to a step, and to no other."""
    return torch.full(SHAPE, float(step), dtype=torch.float64)


def parts(weight: torch.Tensor, rank: int) -> dict[str, BoxedTensor]:
    box = Box.whole(SHAPE).cut(0, WORLD, rank)
    return {"master/w": BoxedTensor(weight[box.slices()], box, SHAPE)}


def found_in(folder: Path) -> torch.Tensor:
    weight = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    load_boxes(folder, {"master/w": BoxedTensor(weight, Box.whole(SHAPE), SHAPE)})
    return weight


def write_on(root: Path) -> None:
    """Go on from the newest sound one, and leave one after the other, until killed."""
    found, _ = newest_sound(list_checkpoints(root))
    step = 0 if found is None else read_manifest(found).step
    if found is not None:
        assert torch.equal(found_in(found), state_at(step))
    discard_after(root, step)
    while True:
        step += 1
        folder = partial_folder(root, step, 0)
        for rank in range(WORLD):
            write_part(folder, parts(state_at(step), rank), rank=rank, world=WORLD, generation=0)
        assert commit(root, step, 0, {"step": step}) is not None
        prune(root, KEEP)


def spoil(folder: Path, how: str, random: Random) -> None:
    victim = random.choice(sorted(folder.glob("*.safetensors")))
    if how == "manifest":
        victim = folder / "manifest.json"
    content = bytearray(victim.read_bytes())
    if how == "remove":
        victim.unlink()
    elif how == "flip":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: random.randrange(len(content))])


def killed_after(root: Path, seconds: float, context: Any) -> None:
    """A writer, for so long once it has come to its first step."""
    before = {folder.name for folder in list_checkpoints(root)}
    process = context.Process(target=write_on, args=(root,), daemon=True)
    process.start()
    deadline = time.monotonic() + 30
    while {folder.name for folder in list_checkpoints(root)} <= before:
        assert process.exitcode is None, "the writer ended"
        assert time.monotonic() < deadline, "no checkpoint in 30 s"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_killed_and_spoilt_again_and_again_there_is_always_a_good_one(tmp_path: Path) -> None:
    random, context, newest = Random(11), _context(), 0
    for _ in range(KILLS):
        killed_after(tmp_path, random.uniform(0, 0.03), context)
        complete = list_checkpoints(tmp_path)
        assert 0 < len(complete) <= KEEP + 1  # killed before the oldest went
        spoilt = complete[len(complete) - random.randrange(len(complete)) :]  # the newest ones; one is left
        for folder in spoilt:
            spoil(folder, random.choice(DAMAGES), random)
        found, damaged = newest_sound(list_checkpoints(tmp_path))
        assert found is not None
        there = list_checkpoints(tmp_path)
        assert found not in spoilt
        assert {folder for folder, _ in damaged} == set(spoilt) & set(there)
        assert found == [folder for folder in complete if folder not in spoilt][-1]
        assert torch.equal(found_in(found), state_at(step_of(found)))
        assert step_of(found) >= newest - KEEP
        newest = step_of(found)
    assert checkpoint_folder(tmp_path, newest) == found
    assert newest > KILLS
