"""Has a run that was struck lost, repeated or altered anything? What it wrote is read, and done again by one process.

Rounding that differs grows over thousands of steps, so one process begins anew at every checkpoint, and what it has at
the next one is compared as well: what a fault spoilt would show at the next checkpoint at the latest.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.faults.found import Deviation
from concertina.config import Job, LayoutConfig
from concertina.layout import Layout
from concertina.parallel.groups import Groups
from concertina.state.manifest import list_checkpoints, verify
from concertina.train.engine import Engine
from concertina.train.standalone import build_engine

__all__ = ["again"]


def again(job: Job, corpus: Path, checkpoints: Path, losses: dict[int, float]) -> Deviation:
    """One process does what lies between any two checkpoints, the last ones included. Raises CheckpointError for one
    that is damaged."""
    plain = job.model_copy(update={"layout": LayoutConfig()})
    engine = build_engine(plain, corpus, torch.device("cpu"))
    engine.configure(Layout(1), 0, Groups.alone())
    engine.start_anew()
    folders = {verify(folder).step: folder for folder in list_checkpoints(checkpoints)}
    loss = tensor = 0.0
    for step in range(1, max(losses) + 1):
        found = engine.train_step(step).loss
        loss = max(loss, abs(losses[step] / found - 1))
        if step in folders:
            tensor = max(tensor, _load(engine, folders[step]))
    return Deviation(loss, tensor, max(losses))


def _load(engine: Engine, folder: Path) -> float:
    """Go on from there; how far what the process had is from it."""
    engine.settle()
    mine = {key: boxed.piece.clone() for key, boxed in engine.state().items()}
    engine.load(folder)
    theirs = {key: boxed.piece for key, boxed in engine.state().items()}
    assert mine.keys() == theirs.keys()
    return max(_distance(mine[key], theirs[key]) for key in mine)


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    most = float(theirs.abs().max()) if theirs.numel() else 0.0
    return float((mine - theirs).abs().max()) / most if most else 0.0
