"""What does Ray cost? The same engine on four ranks, started by Ray's actors and by torchrun, taking turns.

A turn is a whole short run, since two worlds at once would only measure each other. Its sample is the median of its
later steps, as the ranks themselves measured them: during the first ones Ray's processes and the coordinator's MLflow
still start, seconds of processor time that a run has once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.results import Row
from concertina.errors import UserError
from concertina.track.events import EventType, read_events

__all__ = ["RANKS", "measure_ranks", "rows_of_ranks"]

RANKS = 4
STEPS, WARM_UP_STEPS = 72, 36
JOB = Path(__file__).parent.parent / "jobs" / "quickstart.yaml"
GOAL = 0.98
RAY, TORCHRUN = "Ray actors", "torchrun"


def measure_ranks(rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, one sample a round; the corpus is prepared before the first one."""
    samples: dict[str, list[float]] = {RAY: [], TORCHRUN: []}
    with tempfile.TemporaryDirectory(prefix="concertina-benchmark-") as folder:
        storage = Path(folder)
        _run([sys.executable, "-m", "jobs.cli", "data", "prepare", str(JOB), "--set", f"storage_path={storage}"])
        for number in range(rounds):
            # Who goes first alternates: a machine that warms up or slows down favours neither.
            turns = [(RAY, _under_ray), (TORCHRUN, _under_torchrun)]
            for name, turn in turns if number % 2 == 0 else turns[::-1]:
                samples[name].append(turn(storage, number))
    return samples


def rows_of_ranks(samples: dict[str, list[float]]) -> list[Row]:
    """Both rates, and the ratio round by round."""
    ratio = [ray / torchrun for ray, torchrun in zip(samples[RAY], samples[TORCHRUN], strict=True)]
    rows = [Row.of(f"{RANKS} ranks, {name}", "tokens/s", values) for name, values in samples.items()]
    reason = "Ray's own processes and the supervision of the ranks share the cores with them; see docs/log.md"
    rows.append(Row.of(f"{RANKS} ranks, Ray actors against torchrun", "ratio", ratio, GOAL, reason=reason, ceiling=1.0))
    return rows


def _settings(storage: Path) -> list[str]:
    settings = [f"storage_path={storage}", f"training.steps={STEPS}", "training.eval_every_steps=1000000"]
    settings += ["training.eval_sequences=4", "checkpoint.every_steps=1000000"]
    return [word for setting in settings for word in ("--set", setting)]


def _under_ray(storage: Path, number: int) -> float:
    before = set(storage.glob("quickstart-*"))
    _run([sys.executable, "-m", "jobs.cli", "train", str(JOB), *_settings(storage)])
    (run,) = set(storage.glob("quickstart-*")) - before
    return _rate([dict(event.data) for event in read_events(run / "events.jsonl") if event.type == EventType.STEP])


def _under_torchrun(storage: Path, number: int) -> float:
    steps = storage / f"torchrun-{number}.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    _run([*launch, "-m", "concertina.train.standalone", str(JOB), "--steps-file", str(steps), *_settings(storage)])
    return _rate([json.loads(line) for line in steps.read_text().splitlines()])


def _rate(steps: list[dict[str, float]]) -> float:
    kept = steps[WARM_UP_STEPS:]
    return median(float(step["tokens"]) / float(step["step_s"]) for step in kept)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
