"""What does a person see while a run goes on? Lines made from the run's events, and one moving line on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from concertina.config import Job
from concertina.elastic.account import TRAINING, Account, Bucket
from concertina.elastic.notices import NoticeNews
from concertina.elastic.stragglers import StragglerNews
from concertina.track.events import Event, EventType, read_events
from concertina.track.recovery import MemberNews, MemberWhat, Recovery, short_node

__all__ = ["Progress", "format_seconds", "format_tokens"]


def format_tokens(count: float) -> str:
    """41200 -> 41.2k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """4335 -> 1h12m."""
    total = max(0, round(seconds))
    hours, minutes = divmod(total // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"


@dataclass
class _Window:
    """Steps since the last line."""

    seconds: float = 0.0
    tokens: float = 0.0
    steps: int = 0

    def add(self, data: Mapping[str, Any]) -> None:
        self.steps += 1
        self.seconds += float(data.get("step_s", 0.0))
        self.tokens += float(data.get("tokens", 0.0))


@dataclass
class _Goodput:
    """The session's share of productive seconds up to now: the ledger as it was last written, and on from there.

    The ledger is written every half minute and when the membership changes; what a step waits for its peers is known
    to the ledger alone, so steps since then count as productive as those before them were.
    """

    account: Account = field(default_factory=Account)
    written_ns: int = 0
    step_s: float = 0.0
    """Member-seconds of steps since then."""

    def write(self, event: Event) -> None:
        self.account, self.written_ns, self.step_s = Account.from_json(event.data), event.ts_ns, 0.0

    def at(self, event: Event, world: int, waited_s: float) -> float:
        """`waited_s` is how long each of `world` has lived; it counts where there is no ledger yet."""
        account = self.account
        trained_s = sum(account.of(bucket) for bucket in TRAINING)
        share = account.of(Bucket.PRODUCTIVE) / trained_s if trained_s else 1.0
        since_s = (event.ts_ns - self.written_ns) / 1e9 if self.written_ns else waited_s
        productive_s = account.of(Bucket.PRODUCTIVE) + share * self.step_s
        return min(1.0, productive_s / max(account.total_s + since_s * world, productive_s, 1e-9))


@dataclass
class Progress:
    """Follows one run's events.jsonl from where it stands and prints what is worth a line to `stream`."""

    events: Path
    job: Job
    world: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    offset: int = 0
    has_trained: bool = False
    started: float = field(default_factory=time.monotonic)
    _goodput: _Goodput = field(default_factory=_Goodput)
    _window: _Window = field(default_factory=_Window)
    _moving: bool = False

    @property
    def on_terminal(self) -> bool:
        return self.stream.isatty()

    def look(self) -> None:
        """Print what has come since the last look."""
        for event in read_events(self.events, self.offset):
            self.offset = event.end_offset
            line = self._line(event)
            if line:
                self.say(line)

    def say(self, line: str) -> None:
        """One whole line."""
        self._clear()
        print(line, file=self.stream, flush=True)

    def wait(self, text: str) -> None:
        """Something that goes on and will be replaced; nothing unless on a terminal."""
        if self.on_terminal:
            print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)
            self._moving = True

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        self._clear()

    def _clear(self) -> None:
        if self._moving:
            print("\r\x1b[2K", end="", file=self.stream)
            self._moving = False

    def _line(self, event: Event) -> str | None:
        data = event.data
        if event.type == EventType.STEP:
            return self._step(event)
        if event.type == EventType.EVAL:
            sources = {"": data["loss"], **{f"/{name}": loss for name, loss in (data.get("by_source") or {}).items()}}
            losses = " ".join(f"validation_loss{name}={float(loss):.4f}" for name, loss in sources.items())
            return f"step={event.step}/{self.job.training.steps} {losses}"
        if event.type == EventType.CHECKPOINT:
            return f"step={event.step}/{self.job.training.steps} checkpoint={data['path']} bytes={data['bytes']}"
        if event.type == EventType.ANOMALY:
            return f"step={event.step} {data['kind']}: {data['detail']}; action: {data['action']}"
        if event.type == EventType.ROLLBACK:
            return f"step={event.step} rolled back to the checkpoint of step {data['to_step']}"
        if event.type == EventType.STATE:
            reason = f": {data['reason']}" if data.get("reason") else ""
            return f"{data['state'].replace('_', ' ')}{reason}"
        return self._members(event)

    def _members(self, event: Event) -> str | None:
        """What is told of those who train."""
        data = event.data
        if event.type in (EventType.GENERATION, EventType.START):
            self.world = int(data.get("world") or self.world)
        elif event.type == EventType.LEDGER:
            self._goodput.write(event)
        elif event.type == EventType.RECOVERY:
            recovery = Recovery.from_json(data)
            self.world = recovery.world_after
            self._window = _Window()
            return str(recovery)
        elif event.type == EventType.STRAGGLER:
            return str(StragglerNews.from_json(data))
        elif event.type == EventType.NOTICE:
            return f"node {short_node(str(data['node']))}: {NoticeNews.from_json(data)}"
        elif event.type == EventType.MEMBER:
            news = MemberNews.from_json(data)
            # All are born at the beginning and leave at the end; a thousand lines would say nothing.
            is_change = news.reason if news.what is MemberWhat.LEFT else self.has_trained
            if is_change or news.what is MemberWhat.LOST:
                return str(news)
            self.wait(str(news))
        return None

    def _step(self, event: Event) -> str | None:
        data, step = event.data, event.step or 0
        training = self.job.training
        self._window.add(data)
        self.has_trained = True
        self._goodput.step_s += float(data.get("step_s", 0.0)) * self.world
        rate = self._window.tokens / self._window.seconds if self._window.seconds else 0.0
        remaining = (training.steps - step) * self._window.seconds / self._window.steps
        goodput = self._goodput.at(event, self.world, time.monotonic() - self.started)
        line = (
            f"step={step}/{training.steps} loss={float(data['loss']):.4f} lr={float(data['learning_rate']):.2e} "
            f"grad_norm={float(data['grad_norm']):.2f} tok/s={format_tokens(rate)} world={self.world} "
            f"goodput={goodput:.2f} eta={format_seconds(remaining)}"
        )
        if self.job.emulates_compute:
            line += " (emulated compute)"
        if step % training.log_every_steps and step != 1 and step != training.steps:
            self.wait(line)
            return None
        self._window = _Window()
        return line
