"""The driver and the workers of a Ray Train run: `python -m benchmarks.recovery.ray_job SPEC`, for ray_train.py.

As Ray Train's guides have it: TorchTrainer, prepare_model (torch's DDP), report() with a checkpoint from rank 0, and at
the start whatever get_checkpoint() gives.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.processes import end_with_parent

__all__ = ["JobSpec", "fit", "train_loop"]

CHECKPOINT_STEPS = 10
STATE = "state.pt"


@dataclass(frozen=True)
class JobSpec:
    """What the driver is told; a JSON object on its command line."""

    address: str
    folder: str
    """Where the step logs go, and Ray Train's storage."""
    fewest_workers: int
    most_workers: int
    resize_monitor_interval_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def train_loop(config: dict[str, Any]) -> None:
    """One worker, until it is killed or its group is."""
    import ray.train
    import ray.train.torch
    import torch

    from benchmarks.recovery.model import Share, Trainee, batch_of, make_optimizer, prepare_process
    from benchmarks.recovery.stall import StepLog

    prepare_process()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    trainee = Trainee()
    optimizer = make_optimizer(trainee)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE)
        trainee.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model = ray.train.torch.prepare_model(trainee)
    log, share = StepLog(Path(config["folder"]), rank), Share(rank, world)
    while True:
        optimizer.zero_grad()
        loss = model(batch_of(step)[share.sequences], world)
        loss.backward()
        optimizer.step()
        step += 1
        log.applied(step, world)
        if step % CHECKPOINT_STEPS == 0:
            _report(rank, {"step": step, "loss": loss.item()}, trainee, optimizer)


def _report(rank: int, metrics: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Every rank calls it: report() is a barrier."""
    import ray.train
    import torch

    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": metrics["step"]}
        torch.save(state, Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def fit(spec: JobSpec) -> None:
    """Returns or raises when the run ends, which it does not by itself."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=spec.address, log_to_driver=True)
    workers = (spec.fewest_workers, spec.most_workers)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"folder": spec.folder},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, elastic_resize_monitor_interval_s=spec.resize_monitor_interval_s
        ),
        run_config=ray.train.RunConfig(
            name="recovery",
            storage_path=str(Path(spec.folder) / "storage"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    end_with_parent(os.getppid())
    fit(JobSpec(**json.loads(sys.argv[1])))
