"""How does a folder appear whole or not at all? It grows beside its place under another name, and is renamed when all
of it is on storage.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from concertina.errors import ConcertinaError, UserError
from concertina.state.manifest import sync

__all__ = ["check_place", "check_room", "draft_of"]


def check_place(target: Path) -> None:
    """Raises UserError unless a folder can appear there: nothing is overwritten."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty: remove it, or give another folder")


def check_room(target: Path, needed_bytes: int) -> None:
    """Raises ConcertinaError when the file system of `target` has less free than that."""
    there = next(folder for folder in target.resolve().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        text = f"{needed_bytes / 1e9:.1f} GB are to be written below {there}, {free / 1e9:.1f} GB are free: make room"
        raise ConcertinaError(text, needed=needed_bytes, free=free)


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end of the block, or is removed when that fails."""
    check_place(target)
    draft = target.resolve().with_name(f".{target.resolve().name}.partial")
    shutil.rmtree(draft, ignore_errors=True)  # what a kill left
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(target.resolve())
        sync(target.resolve().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
