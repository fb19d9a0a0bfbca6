"""How does a driver bring a prepared job to its end? It finds a cluster, starts the coordinator, and watches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from concertina.config import Job
from concertina.errors import UserError
from jobs.preparation import Prepared
from jobs.progress import Progress
from jobs.signals import Signals
from jobs.watch import Watch

if TYPE_CHECKING:
    from actors.assignment import RunPlan
    from infra.cluster_access import ClusterAccess

__all__ = ["run_session"]


def run_session(prepared: Prepared, address: str | None, progress: Progress) -> tuple[int, str]:
    """Train to the end of the session; (exit code, reason). Ctrl-C stops with a checkpoint, a second one at once."""
    with _cluster(prepared.job, address, progress) as access:
        access.connect(f"concertina-{prepared.folder.run_id}")
        import ray

        signals = Signals()
        try:
            with signals.caught():  # not before: ray.init installs a handler of its own
                handle = _start_coordinator(_plan(prepared))
                return Watch(handle, prepared.folder, progress, signals).until_over()
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
    gpus = _local_gpus(job)
    nodes = min(job.cluster.num_nodes, job.cluster.num_workers)
    cpus = math.ceil(math.ceil(job.cluster.num_workers / nodes) * job.cluster.cpus_per_worker)
    progress.say(f"starting a local Ray cluster: {nodes} nodes of {cpus} logical CPUs")
    with LocalCluster.start(num_nodes=nodes, cpus_per_node=cpus, gpus=gpus) as cluster:
        yield cluster.access


def _local_gpus(job: Job) -> range:
    """All of this machine's GPUs, if they serve for every rank; none otherwise. Raises UserError if they must."""
    if job.cluster.device == "cpu":
        return range(0)
    import torch

    there, wanted = torch.cuda.device_count(), job.cluster.num_workers
    if there >= wanted:
        return range(there)
    if job.cluster.device == "cuda":
        raise UserError(
            f"cluster.num_workers={wanted} wants as many GPUs, this machine has {there}: "
            f"set it to {there or 1} or less, or cluster.device=cpu, or give a cluster with --address"
        )
    return range(0)


def _plan(prepared: Prepared) -> RunPlan:
    import ray

    from actors.assignment import RunPlan

    device, workers = prepared.job.cluster.device, prepared.job.cluster.num_workers
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= workers else "cpu"
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


def _start_coordinator(plan: RunPlan) -> object:
    """The coordinator outlives this process, restarts when it dies, and ends the run in order in both cases."""
    import ray

    from actors.coordinator import COORDINATOR, Coordinator

    options = {
        "name": COORDINATOR,
        "namespace": plan.namespace,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 3,
        "max_task_retries": 3,
        "max_concurrency": 8,
    }
    try:
        return ray.remote(Coordinator).options(**options).remote(plan)
    except ValueError as error:  # the name is taken
        raise UserError(
            f"run {plan.run_id} is still being run on this cluster: stop it first, or wait for its end"
        ) from error
