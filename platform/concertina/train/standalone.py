"""How do ranks train without Ray? `torchrun --nproc-per-node 4 -m concertina.train.standalone jobs/quickstart.yaml`

The same engine and loop, started by torchrun or as one process: for measuring what Ray costs, and for debuggers. It
keeps no MLflow run; `--steps-file` gets one JSON line a committed step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.rendezvous import rendezvous

from concertina.config import Job, load_job
from concertina.data import open_corpus, prepare
from concertina.elastic.messages import Committed, Evaluated, Message
from concertina.elastic.timesheet import Timesheet
from concertina.errors import UserError
from concertina.layout import Layout, check_job, kv_copies
from concertina.model.host_memory import keep_freed_memory
from concertina.parallel.groups import GroupOptions, Groups, form_groups
from concertina.train.engine import Engine
from concertina.train.loop import Loop
from concertina.train.start import find_start

__all__ = ["PrintingLink", "build_engine", "main"]


class PrintingLink:
    """A link to a terminal: committed steps of the first rank become lines, nobody asks it to stop."""

    def __init__(self, steps_file: Path | None = None) -> None:
        self.steps_file = steps_file
        self.committed: list[Committed] = []

    @property
    def recorded(self) -> int:
        return self.committed[-1].step if self.committed else 0

    def word(self) -> int:
        return 0

    def send(self, message: Message) -> None:
        if isinstance(message, Evaluated):
            print(f"step={message.step} validation_loss={message.loss:.4f}", flush=True)
        if not isinstance(message, Committed):
            return
        self.committed.append(message)
        if self.steps_file is not None:
            with self.steps_file.open("a") as file:
                file.write(json.dumps({"step": message.step, **message.metrics}) + "\n")

    def progress(self, step: int, phase: str) -> None:
        pass

    def spent(self, sheet: Timesheet) -> None:
        pass


def build_engine(job: Job, corpus_folder: Path, device: torch.device) -> Engine:
    """An engine on a prepared corpus, not yet configured for a layout. On a CPU this process is from now on one that
    keeps what memory a step took."""
    if device.type == "cpu":
        keep_freed_memory()
    corpus = open_corpus(corpus_folder)
    splits = corpus.sequences(job.data.sequence_length, job.data.validation_fraction)
    return Engine(job, splits.train, splits.validation, device)


def main() -> None:
    """Train a job file on the ranks that torchrun started, or alone."""
    parser = argparse.ArgumentParser(prog="python -m concertina.train.standalone", description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps-file", type=Path)
    arguments = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    job = load_job(Path(arguments.job), [*arguments.overrides, f"cluster.num_workers={world}", "cluster.num_nodes=1"])
    torch.set_num_threads(job.cluster.threads_per_worker)
    layout = check_job(job)
    start = find_start(job)
    engine = build_engine(job, prepare(job.data, Path(job.storage_path), job.model.vocab_size), torch.device("cpu"))
    engine.configure(layout, rank, _groups(layout, rank, kv_copies(job.model, layout.tp)))
    engine.start_anew(start)
    link = PrintingLink(arguments.steps_file)
    with tempfile.TemporaryDirectory(prefix="concertina-standalone-") as folder:
        started = time.perf_counter()
        loop = Loop(engine, Path(folder), link)
        loop.sit(0)
        loop.run()
        seconds = time.perf_counter() - started
    if rank == 0:
        tokens = sum(step.metrics["tokens"] for step in link.committed)
        print(json.dumps({"steps": len(link.committed), "tokens": tokens, "seconds": seconds}), flush=True)


def _groups(layout: Layout, rank: int, lanes_of_kv_head: int) -> Groups:
    if layout.world == 1:
        return Groups.alone()
    timeout = timedelta(seconds=60)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return form_groups(layout, rank, store, GroupOptions(timeout=timeout), lanes_of_kv_head)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
