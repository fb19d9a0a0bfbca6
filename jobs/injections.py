"""How does a driver break the run it watches, on purpose? A thread for each line of `--chaos`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from concertina.elastic.chaos import Injection
from concertina.errors import ConcertinaError, NotFoundError
from concertina.track.run import RunFolder
from jobs.progress import Progress

if TYPE_CHECKING:
    from infra.cluster_access import ClusterAccess

__all__ = ["break_on_purpose", "get_ready_to_break"]

_BORN_S = 0.2


def get_ready_to_break() -> None:
    """Before anybody is polled: a handle of a member imports what a member does, torch too, and on a busy machine a
    driver that imports is silent for longer than a coordinator waits for it."""
    import actors.agent
    import actors.rank  # noqa: F401


def break_on_purpose(
    injections: Sequence[Injection], folder: RunFolder, access: ClusterAccess, progress: Progress
) -> None:
    """Begin, and return. What is done, and what cannot be, is said as progress is."""
    for injection in injections:
        arguments = (injection, folder, access, progress)
        threading.Thread(target=_carry_out, args=arguments, name=f"chaos {injection}", daemon=True).start()


def _carry_out(injection: Injection, folder: RunFolder, access: ClusterAccess, progress: Progress) -> None:
    from actors.injector import Injector

    while not folder.journal_file.exists():
        time.sleep(_BORN_S)
    try:
        Injector(folder, access, lambda strike: progress.say(f"chaos: {strike}")).carry_out(injection)
    except NotFoundError:
        progress.say(f"chaos: {injection}: the run ended before")
    except ConcertinaError as error:
        progress.say(f"chaos: {injection}: {error.message}")
