"""A fine-tuning loses everything before it has a checkpoint: does it begin again with the weights it was given, and
compute what one process does that starts from them?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from concertina.state.manifest import list_checkpoints
from concertina.track.events import EventType
from tests.actors.conftest import Start
from tests.actors.drive import Drive, environment

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(600)]

STEPS = 40


def alone(ground: Path, words: list[str], lines: Path) -> dict[int, float]:
    """Losses of the same job on one process."""
    command = [sys.executable, "-m", "concertina.train.standalone", str(ground / "tiny.yaml")]
    here = [*words, "layout.ep=1", f"storage_path={ground / 'runs'}"]
    options = [word for key in here for word in ("--set", key)]
    done = subprocess.run([*command, *options, "--steps-file", str(lines)], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return {line["step"]: line["loss"] for line in map(json.loads, lines.read_text().splitlines())}


def test_all_members_killed_before_a_checkpoint_it_begins_with_the_same_weights(
    ground: Path, start: Start, reference: Drive, nothing_left: Callable[[Drive], None], tmp_path: Path
) -> None:
    base = list_checkpoints(reference.run.checkpoints)[-1]
    words = [
        f"training.steps={STEPS}",
        "training.learning_rate=5e-4",
        "training.seed=3",
        "training.eval_every_steps=20",
        "checkpoint.every_steps=100000",
        f"checkpoint.initial_load_path={reference.run.run_id}",
    ]
    drive = start(*(word for key in words for word in ("--set", key)))
    drive.reaches(5)
    for pid in drive.journal()["pids"].values():
        os.kill(pid, signal.SIGKILL)
    assert drive.ends(300) == 0, drive.err
    assert f"its weights begin as those of {base}" in drive.err
    assert [event.data["to_step"] for event in drive.events(EventType.ROLLBACK)] == [0]
    expected = alone(ground, words, tmp_path / "alone.jsonl")
    found = drive.steps()
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-10, abs=0)
    random = alone(ground, [*words[:-1], "training.steps=1"], tmp_path / "random.jsonl")
    assert found[1] < 0.9 * random[1], "it would not be seen if it began with other weights"
    nothing_left(drive)
