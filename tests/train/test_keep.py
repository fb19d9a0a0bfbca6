"""Do those who are left write the very checkpoint that all would have written, and none when a piece is missing?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from concertina.elastic.messages import PartWritten
from concertina.layout import Layout
from concertina.state.manifest import checkpoint_folder, list_checkpoints, partial_folder, verify
from concertina.train.loop import STOP, Loop
from tests.distributed import run_distributed
from tests.train.generations import Life, Stage, on_nodes
from tests.train.test_loop import Recorder
from tests.train.test_loop import run as run_loop
from tests.train.worlds import tiny_job, unconfigured
from tests.waiting import wait_until

pytestmark = pytest.mark.dist

JOB = tiny_job(training__steps=16, model__router_bias_update_rate=0.01, checkpoint__every_steps=100)
SEATING = on_nodes(Layout(4, ep=2), {0: "a", 1: "a", 2: "b", 3: "b"})
STEP, NUMBER = 7, 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that four ranks leave which are stopped after `STEP`."""
    root = tmp_path_factory.mktemp("uninterrupted")
    run_distributed(run_loop, 4, JOB, root, 4, 2, {STEP: STOP}, None)
    return checkpoint_folder(root, STEP)


def survive(rank: int, store: Any, stage: Stage, root: Path) -> list[PartWritten]:
    """Train, lose peers, bring the step to its end that somebody has applied, and keep it."""
    life = Life(rank, store, JOB, unconfigured(JOB))
    life.enter(0, [stage])
    life.train(stage.until)
    life.fail(stage)
    if rank in stage.lost:
        return []
    life.agree(0, stage)
    link = Recorder(root)
    keepers = SEATING.keepers({*SEATING.members} - {*stage.lost})
    mine = [number for number, member in enumerate(keepers) if member == rank]
    Loop(life.engine, root, link).keep(NUMBER, [number for number in mine if number != rank])
    wait_until(lambda: len(link.sent) == len(mine))
    return link.of(PartWritten)


@pytest.mark.parametrize(
    ("lost", "fault", "behind"),
    [((2, 3), "some", (0,)), ((0, 1), "some", (3,)), ((3,), "some", (0, 1))],
    ids=["a node", "the first node", "a rank"],
)
def test_who_is_left_writes_what_all_would_have_written(
    lost: tuple[int, ...], fault: str, behind: tuple[int, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    stage = Stage(SEATING, STEP - 1, lost, fault, behind)
    told = run_distributed(survive, 4, stage, tmp_path)
    (found,) = list_checkpoints(tmp_path)
    kept, whole = verify(found), verify(uninterrupted)
    assert (kept.step, kept.generation, kept.facts) == (STEP, NUMBER, whole.facts)
    assert kept.files.keys() == whole.files.keys()
    for name in whole.files:
        theirs, ours = load_file(uninterrupted / name), load_file(found / name)
        assert theirs.keys() == ours.keys()
        assert [key for key in theirs if not torch.equal(theirs[key], ours[key])] == [], "not the last bit differs"
    assert sorted(part.rank for parts in told for part in parts) == [0, 1, 2, 3]


def test_with_a_piece_missing_there_is_no_checkpoint(tmp_path: Path) -> None:
    second = SEATING.seconds[0]
    assert second is not None
    stage = Stage(SEATING, STEP - 1, (0, second), "computing")
    told = run_distributed(survive, 4, stage, tmp_path)
    assert sorted(part.rank for parts in told for part in parts) == sorted({1, 2, 3} - {second})
    assert list_checkpoints(tmp_path) == []
    assert partial_folder(tmp_path, STEP - 1, NUMBER).exists()
