"""Which checkpoint can be gone on from? The newest one of which every byte is what was written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from concertina.errors import CheckpointError
from concertina.state.manifest import verify

__all__ = ["Damage", "newest_sound"]

Damage = tuple[Path, str]
"""A checkpoint, and what is wrong with it."""


def newest_sound(checkpoints: Iterable[Path], trusted: Path | None = None) -> tuple[Path | None, list[Damage]]:
    """The last of these, oldest first, that is sound, and those that were passed over. `trusted` has been read."""
    damaged: list[Damage] = []
    for folder in reversed(list(checkpoints)):
        try:
            if folder != trusted:
                verify(folder)
        except (CheckpointError, OSError) as error:
            damaged.append((folder, str(error)))
        else:
            return folder, damaged
    return None, damaged
