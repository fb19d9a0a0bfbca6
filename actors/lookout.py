"""Does the cloud say that this node will go? The node's agent asks, and tells the coordinator and Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from concertina.elastic.notices import Notice, Source
from infra.metadata import NoAnswer, NoticeSource

__all__ = ["Lookout"]

log = logging.getLogger("concertina.agent")

_LOOK_S = 1.0
_SAY_AGAIN_S = 5.0  # to a coordinator that has restarted, or was away for a moment
_NEWS_S = 60.0  # so long also that there is no notice any more

Tell = Callable[[list[Source], list[Notice]], bool]
"""What these sources say now. Whether somebody heard it."""


class Lookout:
    """Asks `sources` once a second in a thread of its own; `look_at` changes them."""

    def __init__(self, sources: Sequence[NoticeSource], tell: Tell) -> None:
        self._sources, self._tell = list(sources), tell
        self._told: dict[Source, list[str]] = {}
        self._told_s = 0.0
        self._news_s = -_NEWS_S
        self._silent: set[Source] = set()
        self._hidden: dict[Source, NoticeSource] = {}
        self._begun = False
        self._begin()

    def look_at(self, source: NoticeSource) -> None:
        """This one as well, or instead of the one of the same cloud, until `look_away`."""
        self._hidden |= {other.source: other for other in self._sources if other.source is source.source}
        self._sources = [*(other for other in self._sources if other.source is not source.source), source]
        self._begin()

    def look_away(self, cloud: Source) -> None:
        """From what `look_at` brought: the one before it is asked again."""
        before = self._hidden.pop(cloud, None)
        if before is not None:
            self._sources = [*(other for other in self._sources if other.source is not cloud), before]

    def _begin(self) -> None:
        if self._sources and not self._begun:
            self._begun = True
            threading.Thread(target=self._look_out, name="lookout", daemon=True).start()

    def _look_out(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self.look(began)
            except Exception:
                log.exception("looked out in vain, and will again")  # nobody else does on this node
            time.sleep(max(0.0, _LOOK_S - (time.monotonic() - began)))

    def look(self, now: float) -> None:
        """Ask all of them once, and tell what is new."""
        answers: dict[Source, list[Notice]] = {}
        for source in self._sources:
            try:
                answers[source.source] = source.poll()
                self._silent.discard(source.source)
            except NoAnswer as error:
                if source.source not in self._silent:
                    log.warning("no notices from %s, asked again every second: %s", source.source, error)
                self._silent.add(source.source)
        said = {source: [f"{n.is_hint} {n.text}" for n in found] for source, found in answers.items()}
        is_news = any(self._told.get(source, []) != lines for source, lines in said.items())
        if is_news:
            self._news_s = now
        is_due = now - self._told_s > _SAY_AGAIN_S and (any(said.values()) or now - self._news_s < _NEWS_S)
        if (is_news or is_due) and self._tell(list(answers), [n for found in answers.values() for n in found]):
            self._told |= said
            self._told_s = now
