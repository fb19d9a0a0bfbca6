"""Is a checkpoint found by run, by beginning of a run's id, by folder of checkpoints and by its own folder?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concertina.errors import NotFoundError
from concertina.state.manifest import commit, partial_folder
from concertina.state.streamed import StreamedPart
from concertina.track.run import create_run
from jobs.which_checkpoint import find_checkpoint, find_root
from tests.train.worlds import tiny_job

pytestmark = pytest.mark.unit


def test_every_name_of_it(tmp_path: Path) -> None:
    run = create_run(tmp_path / "runs", tiny_job(), None, "a-run")
    storage = str(tmp_path / "runs")
    with pytest.raises(NotFoundError, match="no complete checkpoint in"):
        find_checkpoint("a-run", storage)
    for step in (5, 10):
        part = StreamedPart(partial_folder(run.checkpoints, step, 0), {"master/a": (torch.float32, (2,))})
        part.write("master/a", torch.zeros(2))
        part.finish()
        commit(run.checkpoints, step, 0, {"step": step})
    newest = run.checkpoints / "step-00000010"
    for name in ("a-run", "a-", "latest", str(run.path), str(run.checkpoints), str(newest)):
        assert find_checkpoint(name, storage) == newest
    first = run.checkpoints / "step-00000005"
    assert find_checkpoint(str(first), storage) == first
    assert find_root("a-run", storage) == run.checkpoints
    with pytest.raises(NotFoundError, match="no run 'b'"):
        find_checkpoint("b", storage)
