"""Which code, which libraries, which machine? Facts for a run's versions.json, found without importing them."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import concertina

__all__ = ["versions"]

_LIBRARIES = ("torch", "ray", "mlflow", "numpy", "tokenizers", "safetensors")
_GIT_TIMEOUT_S = 10


def versions() -> dict[str, Any]:
    """Versions of ours, of Python and of the libraries, the machine, and `git` (commit, dirty) of our source or
    None when it is no checkout."""
    return {
        "concertina": concertina.__version__,
        "git": _git(Path(concertina.__file__).resolve()),
        "python": platform.python_version(),
        **{name: _installed(name) for name in _LIBRARIES},
        "hostname": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(source: Path) -> dict[str, Any] | None:
    """Commit of the checkout `source` is tracked in. A virtual environment inside somebody's checkout is not
    tracked there, and its commit would be a lie."""
    if _run_git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _run_git(source.parent, "rev-parse", "HEAD")
    changes = _run_git(source.parent, "status", "--porcelain", "--untracked-files=normal")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _run_git(folder: Path, *args: str) -> str | None:
    # Without the optional lock, `git status` next to somebody's `git commit` disturbs neither.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
