"""Does anything read from storage where nothing may?

Python tells its audit hooks of every file that it opens, whoever asks: our manifests, torch's checkpoints, numpy. The
library behind safetensors opens files itself, so its doors are locked by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["StorageRead", "storage_forbidden"]

_INNOCENT = ("/proc/", "/sys/", "/dev/", f"{sys.prefix}/", f"{sys.base_prefix}/")  # the kernel's, and what is installed
_CODE = (".py", ".pyc", ".so")  # a member that is new imports


class StorageRead(AssertionError):
    """A file was opened where nothing may read from storage."""


class _Guard:
    """One a process: an audit hook stays for ever."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        self.hooked = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and not arguments[2] & os.O_CREAT:
            self.refuse(arguments[0])

    def refuse(self, path: Any, *_: Any, **__: Any) -> None:
        if isinstance(path, int):
            return  # already open
        name = os.fsdecode(path)
        if name.startswith(_INNOCENT) or name.endswith(_CODE):
            return
        assert self.opened is not None
        self.opened.append(name)
        raise StorageRead(name)


_guard = _Guard()


@contextmanager
def storage_forbidden() -> Iterator[None]:
    """Whatever opens a file that was there before fails, and so does the whole, should somebody have caught that."""
    if not _guard.hooked:
        sys.addaudithook(_guard.hook)
        _guard.hooked = True
    _guard.opened = opened = []
    try:
        with (
            mock.patch("safetensors.safe_open", _guard.refuse),
            mock.patch("safetensors.torch.safe_open", _guard.refuse),
        ):
            yield
    finally:
        _guard.opened = None
    if opened:
        raise StorageRead(", ".join(opened))
