"""How does a driver bring a job to its end? It prepares, finds a cluster, starts the coordinator, and watches.

Everything that can be wrong with the input is found before a cluster is started or an actor made.
"""

from __future__ import annotations

import math
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from concertina.config import Job
from concertina.errors import CheckpointError, ConcertinaError, DataError, NotFoundError, UserError
from concertina.layout import Axis, Layout
from concertina.track.run import DataFacts, RunFolder, create_run
from concertina.track.summary import summarize
from jobs.progress import Progress

if TYPE_CHECKING:
    from actors.assignment import RunPlan
    from actors.coordinator import Status
    from infra.cluster_access import ClusterAccess

__all__ = ["Prepared", "prepare_new", "prepare_resume", "run_session"]

POLL_S = 0.25


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its folder is there, its data is tokens, its checkpoint has been verified."""

    job: Job
    layout: Layout
    folder: RunFolder
    corpus: Path
    resume_from: Path | None = None
    resume_step: int = 0
    generation: int = 0


def prepare_new(job: Job, layout: Layout) -> Prepared:
    """Make a run's folder. Raises UserError for what this engine cannot do, DataError for the corpus."""
    _refuse_unsupported(layout)
    corpus, facts = _prepare_data(job)
    return Prepared(job, layout, create_run(Path(job.storage_path), job, facts), corpus)


def prepare_resume(folder: RunFolder, job: Job, layout: Layout) -> Prepared:
    """Continue a run from its newest sound checkpoint. Raises NotFoundError, CheckpointError or DataError."""
    from concertina.state.manifest import list_checkpoints, read_manifest

    _refuse_unsupported(layout)
    corpus, facts = _prepare_data(job)
    before = folder.data_facts()
    if before is not None and before.fingerprint != facts.fingerprint:
        raise DataError(
            f"run {folder.run_id} was trained on corpus {before.fingerprint}, now it is {facts.fingerprint}: "
            "its files have changed; restore them, or start a new run"
        )
    checkpoints = list_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise NotFoundError(f"run {folder.run_id} has no checkpoint to resume from: start a new run")
    chosen = _newest_sound(checkpoints)
    step = read_manifest(chosen).step
    if step >= job.training.steps:
        raise UserError(
            f"run {folder.run_id} stands at step {step} of {job.training.steps}: nothing is left to do; "
            f"give it more with --set training.steps={step * 2}"
        )
    folder.write_job(job)
    generation = summarize(folder).shape.generation + 1
    return Prepared(job, layout, folder, corpus, chosen, step, generation)


def _newest_sound(checkpoints: list[Path]) -> Path:
    from concertina.state.manifest import verify

    for folder in reversed(checkpoints):
        try:
            verify(folder)
        except CheckpointError as error:
            print(f"warning: {error}: trying the checkpoint before it", file=sys.stderr)
        else:
            return folder
    raise CheckpointError(f"none of {len(checkpoints)} checkpoints in {checkpoints[0].parent} is sound")


def _refuse_unsupported(layout: Layout) -> None:
    """The layout may have any degrees; the engine has dp, ep and edp so far."""
    wanted = [f"{axis.value}={layout.degree(axis)}" for axis in (Axis.PP, Axis.CP, Axis.TP, Axis.ETP)]
    wanted = [text for text in wanted if not text.endswith("=1")]
    if wanted:
        raise UserError(
            f"the engine does not train {' '.join(wanted)} yet: set layout.pp, cp, tp and etp to 1 "
            "(`concertina layout` draws any of them)"
        )


def _prepare_data(job: Job) -> tuple[Path, DataFacts]:
    from concertina.data import TokenCorpus, prepare

    shown = _PreparationLine()
    folder = prepare(job.data, Path(job.storage_path), job.model.vocab_size, shown)
    shown.close()
    corpus = TokenCorpus.open(folder)
    splits = corpus.sequences(job.data.sequence_length, job.data.validation_fraction)
    if not len(splits.train) or not len(splits.validation):
        raise DataError(
            f"{corpus.num_tokens} tokens give {len(splits.train)} sequences of {job.data.sequence_length} to train on "
            f"and {len(splits.validation)} to validate on: give more text or a smaller data.sequence_length"
        )
    source = job.data.source if isinstance(job.data.source, str) else ",".join(job.data.source)
    return folder, DataFacts(source, corpus.fingerprint, corpus.num_tokens, str(folder))


class _PreparationLine:
    """Says once what takes long."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"preparing data: {what} ({total / 1e6:.1f} MB)", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def run_session(prepared: Prepared, address: str | None, progress: Progress) -> tuple[int, str]:
    """Train to the end of the session; (exit code, reason). Ctrl-C stops with a checkpoint, a second one at once."""
    with _cluster(prepared.job, address, progress) as access:
        access.connect(f"concertina-{prepared.folder.run_id}")
        import ray

        try:
            plan = _plan(prepared)
            handle = _start_coordinator(plan)
            status = _watch(handle, progress)
            return status.exit_code, status.reason
        finally:
            ray.shutdown()


@contextmanager
def _cluster(job: Job, address: str | None, progress: Progress) -> Iterator[ClusterAccess]:
    from infra.find_cluster import find_cluster
    from infra.local_cluster import LocalCluster

    found = find_cluster(address)
    if found is not None:
        yield found
        return
    nodes = min(job.cluster.num_nodes, job.cluster.num_workers)
    cpus = math.ceil(math.ceil(job.cluster.num_workers / nodes) * job.cluster.cpus_per_worker)
    progress.say(f"starting a local Ray cluster: {nodes} nodes of {cpus} logical CPUs")
    with LocalCluster.start(num_nodes=nodes, cpus_per_node=cpus, gpus=_local_gpus(job)) as cluster:
        yield cluster.access


def _local_gpus(job: Job) -> range:
    if job.cluster.device == "cpu":
        return range(0)
    import torch

    return range(torch.cuda.device_count())


def _plan(prepared: Prepared) -> RunPlan:
    import ray

    from actors.assignment import RunPlan

    device = prepared.job.cluster.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    return RunPlan(
        run_id=prepared.folder.run_id,
        folder=prepared.folder.path,
        corpus=prepared.corpus,
        job=prepared.job,
        layout=prepared.layout,
        device=device,
        session=secrets.token_hex(4),
        token=secrets.token_hex(32),
        generation=prepared.generation,
        resume_from=prepared.resume_from,
        resume_step=prepared.resume_step,
    )


def _start_coordinator(plan: RunPlan) -> Any:
    """The coordinator outlives this process, restarts when it dies, and ends the run in order in both cases."""
    import ray

    from actors.coordinator import Coordinator
    from actors.hands import COORDINATOR

    options = {
        "name": COORDINATOR,
        "namespace": plan.namespace,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 3,
        "max_task_retries": 3,
        "max_concurrency": 8,
    }
    return ray.remote(Coordinator).options(**options).remote(plan)


def _watch(handle: Any, progress: Progress) -> Status:
    """Poll until the run is over and everything of it has been given back."""
    asked = _Signals()
    with asked.caught():
        while True:
            status = _poll(handle)
            progress.look()
            if status.over:
                handle.leave.remote()
                progress.close()
                return status
            if status.state.value in ("waiting_for_capacity", "forming"):
                progress.wait(status.waiting or status.state.value)
            if asked.pending:
                text = (
                    "stopping without a checkpoint"
                    if asked.count > 1
                    else ("stopping with a checkpoint at the end of this step; once more to stop at once")
                )
                progress.say(text)
                handle.stop.remote("Ctrl-C" if asked.number == signal.SIGINT else "SIGTERM", asked.count > 1)
                asked.pending = False
            time.sleep(POLL_S)


def _poll(handle: Any) -> Status:
    """Ask the coordinator; one that restarts is waited for."""
    import ray
    from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

    until = time.monotonic() + 90.0
    while True:
        try:
            status: Status = ray.get(handle.poll.remote(), timeout=30.0)
            return status
        except (ActorUnavailableError, GetTimeoutError) as error:
            if time.monotonic() > until:
                raise ConcertinaError(f"the coordinator does not answer: {str(error).splitlines()[0]}") from error
        except RayActorError as error:
            raise ConcertinaError(f"the coordinator is gone: {str(error).splitlines()[0]}") from error
        time.sleep(POLL_S)


class _Signals:
    """SIGINT and SIGTERM, counted."""

    def __init__(self) -> None:
        self.count = 0
        self.number = 0
        self.pending = False

    def _on(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = number
        self.pending = True

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
