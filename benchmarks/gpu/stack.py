"""Which torch, CUDA and NCCL are measured, and are they some that this was written for?"""

from __future__ import annotations

from concertina.errors import UserError

__all__ = ["refuse_unknown_torch", "stack"]

_FIRST, _LAST = (2, 11), (2, 15)


def refuse_unknown_torch(version: str) -> None:
    """Raises UserError outside of 2.11 to 2.15."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not _FIRST <= found <= _LAST:
        raise UserError(f"torch {version}: this was written for 2.11 to 2.15; set up an environment with one of them")


def stack() -> str:
    """In one line. NCCL is the one that torch has loaded."""
    import torch

    refuse_unknown_torch(torch.__version__)
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, no GPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, {torch.cuda.get_device_name()}"
