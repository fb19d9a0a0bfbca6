"""One process of torchft's, for torchft.py: `python -m benchmarks.recovery.torchft_replica INDEX FOLDER SETTINGS`, or
`... lighthouse FOLDER SETTINGS`, which prints its address and serves until it is killed.

A replica is as torchft's own train_ddp.py has it: its DDP, its optimizer, healing over HTTP from a living peer. The
batch is the global one, divided among those that take part in the step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.recovery.model import Share, Trainee, batch_of, make_optimizer, prepare_process
from benchmarks.recovery.stall import StepLog
from infra.processes import end_with_parent

__all__ = ["LIGHTHOUSE", "serve", "train"]

LIGHTHOUSE = "lighthouse"
LOOPBACK = "127.0.0.1"


def train(index: int, folder: Path, settings: dict[str, Any]) -> None:
    """Until it is killed."""
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    prepare_process()
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    trainee = Trainee()
    plain_optimizer = make_optimizer(trainee)

    def load_state_dict(state: dict[str, Any]) -> None:
        trainee.load_state_dict(state["model"])
        plain_optimizer.load_state_dict(state["optimizer"])

    def state_dict() -> dict[str, Any]:
        return {"model": trainee.state_dict(), "optimizer": plain_optimizer.state_dict()}

    timeout = timedelta(seconds=settings["timeout_s"])
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=timedelta(seconds=settings["quorum_timeout_s"]),
        rank=0,
        world_size=1,
        store_addr=LOOPBACK,
        store_port=store.port,
        replica_id=f"replica_{index}",
        hostname=LOOPBACK,
        heartbeat_interval=timedelta(milliseconds=settings["heartbeat_interval_ms"]),
        init_sync=False,  # all build the same weights from the seed
    )
    model = DistributedDataParallel(manager, trainee)
    optimizer = Optimizer(manager, plain_optimizer)
    log = StepLog(folder, index)
    while True:
        step = manager.current_step()
        optimizer.zero_grad()  # starts the quorum
        world = manager.num_participants()
        place = manager.participating_rank()
        step = manager.current_step()  # a replica that heals has just learned it
        share = Share(place or 0, max(1, world))  # who heals computes along, its gradients are not counted
        model(batch_of(step)[share.sequences], world).backward()
        optimizer.step()
        if manager.current_step() > step:
            log.applied(manager.current_step(), world)


def serve(settings: dict[str, Any]) -> None:
    """The lighthouse; it logs every quorum, to standard error."""
    from torchft.coordination import LighthouseServer

    dials = {name: settings[name] for name in ("join_timeout_ms", "quorum_tick_ms", "heartbeat_timeout_ms")}
    server = LighthouseServer(bind=f"{LOOPBACK}:0", min_replicas=1, **dials)
    print(f"http://{LOOPBACK}:{server.address().rpartition(':')[2]}", flush=True)
    signal.pause()


def main() -> None:
    role, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    end_with_parent(os.getppid())
    try:
        if role == LIGHTHOUSE:
            serve(settings)
        train(int(role), folder, settings)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(1)  # it is never done by itself; torchft's threads would wait for peers


if __name__ == "__main__":
    main()
