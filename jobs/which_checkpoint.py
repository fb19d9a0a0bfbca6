"""Which checkpoint does the command line mean: a folder, or the newest of a run?"""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_checkpoint", "find_root"]


def find_root(run: str, storage: str) -> Path:
    """The folder of checkpoints: of a run, or the one that is named. Raises NotFoundError."""
    from concertina.track.run import open_run

    path = Path(run)
    if path.is_dir() and not (path / "job.yaml").exists():
        return path
    return open_run(path.parent if path.is_dir() else Path(storage), path.name).checkpoints


def find_checkpoint(name: str, storage: str) -> Path:
    """A complete checkpoint. Raises NotFoundError."""
    from concertina.train.start import find_checkpoint

    return find_checkpoint(name, Path(storage))
