"""How is an NCCL group formed so that a supervisor can end it? Written from the documentation: not run here.

The watchdog would kill the process when a collective fails; here the supervisor's thread aborts, and the process goes
on. Forming does not block in C, so that it can be aborted too.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from concertina.errors import ConfigError
from concertina.parallel.forming import Call, Place

__all__ = ["form_nccl", "refuse_bad_version", "settings"]

_BAD = (((2, 25, 1), (2, 25, 1)), ((2, 28, 3), (2, 28, 8)))
"""First and last: 2.25.1 hangs in ncclCommAbort (pytorch issue 149153), 2.28.3 to 2.28.8 crash when communicators are
formed again in the same process (NVIDIA Resiliency Extension's documentation)."""


def settings(timeout: timedelta) -> dict[str, str]:
    """Environment that torch reads when a process makes its first NCCL group."""
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # the supervisor aborts, not torch's watchdog
        "TORCH_NCCL_ENABLE_MONITORING": "0",  # a watchdog that an abort holds up is no reason to die
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_PROPAGATE_ERROR": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_DIST_USE_NCCL2": "0",  # from torch 2.15 on the name nccl is another backend's; ours is this one
        "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(max(1, int(timeout.total_seconds()))),
    }


def refuse_bad_version(version: tuple[int, ...]) -> None:
    """Raises ConfigError for an NCCL that cannot be aborted or formed again."""
    if any(first <= version[:3] <= last for first, last in _BAD):
        text = ".".join(map(str, version))
        raise ConfigError(f"NCCL {text} hangs or crashes when groups are formed again: use 2.26.2 to 2.28.2 or 2.28.9+")


def form_nccl(places: list[Place], call: Call) -> list[Any]:
    """A backend for each place, connected, on the current device, as `form_gloo`. Cutting the wires aborts them, also
    while they connect."""
    refuse_bad_version(torch.cuda.nccl.version())
    os.environ.update(settings(call.timeout))
    return [_form(place, call) for place in places]


def _form(place: Place, call: Call) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = call.timeout
    options.config.blocking = 0
    store = dist.PrefixStore(f"{call.key}/{place.name}/{place.ranks[0]}", call.store)
    backend = dist.ProcessGroupNCCL(store, place.position, len(place.ranks), options)
    call.wires.register(backend)
    backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return backend
