"""How does a driver bring a prepared job to its end? It finds a cluster, starts the coordinator, and watches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from concertina.config import Job
from concertina.elastic.chaos import Injection
from concertina.errors import NotFoundError, UserError
from jobs.injections import break_on_purpose, get_ready_to_break
from jobs.preparation import Prepared, forget, refuse_stages_on_gpus
from jobs.progress import Progress
from jobs.signals import Signals
from jobs.watch import Watch

if TYPE_CHECKING:
    from actors.assignment import RunPlan
    from infra.cluster_access import ClusterAccess

__all__ = ["Place", "find_place", "run_session"]


@dataclass(frozen=True)
class Place:
    """Where a run is to be: on a cluster that is there, or on one to be started here with these GPUs."""

    running: ClusterAccess | None
    gpus: range = range(0)


def find_place(job: Job, address: str | None) -> Place:
    """Starts nothing. Raises NotFoundError when no cluster answers at `address`, UserError for GPUs we lack."""
    from infra.find_cluster import find_cluster

    running = find_cluster(address)
    return Place(running) if running is not None else Place(None, _local_gpus(job))


def run_session(
    prepared: Prepared, place: Place, progress: Progress, injections: Sequence[Injection] = ()
) -> tuple[int, str]:
    """Train to the end of the session; (exit code, reason). Ctrl-C stops with a checkpoint, a second one at once."""
    with ExitStack() as stack:
        try:
            with Signals.raised():
                if injections:
                    get_ready_to_break()
                access = stack.enter_context(_cluster(prepared.job, place, progress))
                access.connect(f"concertina-{prepared.folder.run_id}")
            import ray

            stack.callback(ray.shutdown)
            signals = Signals()
            stack.enter_context(signals.caught())  # not before: ray.init installs a handler of its own
            handle = _start_coordinator(_plan(prepared))
        except BaseException:
            forget(prepared)
            raise
        break_on_purpose(injections, prepared.folder, access, progress)
        return Watch(handle, prepared.folder, progress, signals).until_over()


@contextmanager
def _cluster(job: Job, place: Place, progress: Progress) -> Iterator[ClusterAccess]:
    from infra.local_cluster import LocalCluster

    if place.running is not None:
        yield place.running
        return
    nodes = min(job.cluster.num_nodes, job.cluster.num_workers)
    cpus = math.ceil(math.ceil(job.cluster.num_workers / nodes) * job.cluster.cpus_per_worker)
    progress.say(f"starting a local Ray cluster: {nodes} nodes of {cpus} logical CPUs")
    with LocalCluster.start(num_nodes=nodes, cpus_per_node=cpus, gpus=place.gpus) as cluster:
        yield cluster.access


def _local_gpus(job: Job) -> range:
    """All of this machine's GPUs, if they serve for every rank; none otherwise. Raises UserError if they must."""
    if job.cluster.device in ("cpu", "timed"):
        return range(0)
    there, wanted = _count_gpus(), job.cluster.num_workers
    if there >= wanted:
        return range(there)
    if job.cluster.device == "cuda":
        fewer = f"set it to {there} or less, or " if there else "set "
        raise UserError(
            f"cluster.num_workers={wanted} wants as many GPUs, this machine has {there}: "
            f"{fewer}cluster.device=cpu, or give a cluster with --address"
        )
    return range(0)


def _count_gpus() -> int:
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0  # known without torch, which takes a second to import
    import torch

    return torch.cuda.device_count()


def _plan(prepared: Prepared) -> RunPlan:
    import ray

    from actors.assignment import RunPlan

    device, workers = prepared.job.cluster.device, prepared.job.cluster.num_workers
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= workers else "cpu"
        if device == "cuda":
            refuse_stages_on_gpus(prepared.layout)
    elif device == "timed":
        device = "cpu"
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


def _on_the_head() -> object:
    """Where the coordinator lives: the cluster goes with its head in any case, other nodes may go at any time."""
    from ray import nodes
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [node for node in nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    if not heads:
        raise NotFoundError("the cluster has no head node any more: start it again, `ray start --head`")
    return NodeAffinitySchedulingStrategy(heads[0]["NodeID"], soft=False)


def _start_coordinator(plan: RunPlan) -> object:
    """The coordinator outlives this process, restarts when it dies, and ends the run in order in both cases."""
    import ray

    from actors.coordinator import COORDINATOR, Coordinator

    options = {
        "name": COORDINATOR,
        "namespace": plan.namespace,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 1000,  # it ends by itself if no step comes of them (actors/conductor.py)
        "max_task_retries": 3,
        "max_concurrency": 8,
        "scheduling_strategy": _on_the_head(),
    }
    try:
        return ray.remote(Coordinator).options(**options).remote(plan)
    except ValueError as error:  # the name is taken
        raise UserError(
            f"run {plan.run_id} is still being run on this cluster: stop it first, or wait for its end"
        ) from error
