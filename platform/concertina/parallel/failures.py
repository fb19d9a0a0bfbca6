"""Did this exception come from the network between ranks, or from the rank's own work?"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

__all__ = ["in_one_line", "is_communication_failure", "is_hardware_failure"]

# Gloo raises plain RuntimeErrors; these are the only marks its messages share: its own source files, a socket's end.
_MARKS = (
    "gloo/transport/",
    "gloo/rendezvous/",
    "onnection closed by peer",
    "onnection reset by peer",
    "pair closure",
    "Broken pipe",
)


def is_communication_failure(error: BaseException) -> bool:
    """Whether a peer's end, not this rank, is the likely cause: such an error is never the first to blame."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def in_one_line(error: BaseException) -> str:
    """What an exception says, for a person: its first line, of gloo's only the clause that says what happened."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not is_communication_failure(error):
        return first
    said = re.sub(r"^\[[^\]]*\]\s*", "", first)  # the source file of gloo it comes from
    return re.split(r"\. (?=[A-Z])", said)[0].rstrip(".")


def is_hardware_failure(error: BaseException) -> bool:
    """Whether the device, not the program, is the likely cause: another member would not meet it."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError)
