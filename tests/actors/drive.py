"""A driver as a user starts one, in a process of its own, and what it leaves: how do tests run and read whole runs?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from concertina.track.events import Event, EventType, read_events, void_after
from concertina.track.recovery import MemberNews, MemberWhat, Recovery
from concertina.track.run import RunFolder
from infra.lab import Lab
from tests.waiting import wait_until

ENDLESS = "training.steps=100000"
STEPS = 150
SHORT = ("--set", f"training.steps={STEPS}", "--set", "training.eval_every_steps=50")

JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
    },
    "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 300}},
    "training": {
        "steps": 60,
        "global_batch_size": 6,
        "warmup_steps": 2,
        "eval_every_steps": 20,
        "eval_sequences": 4,
        "precision": "float64",
    },
    "layout": {"ep": 2},
    "cluster": {"num_workers": 2, "num_nodes": 1},
    "checkpoint": {"every_steps": 20, "keep": 2},
}


def write_job(folder: Path) -> Path:
    """A job of two ranks on a small folder of text; its steps take milliseconds."""
    text = folder / "text"
    text.mkdir(parents=True)
    for name in ("argparse", "ast", "bdb"):
        (text / f"{name}.txt").write_text(Path(os.__file__).with_name(f"{name}.py").read_text()[:20_000])
    job = folder / "tiny.yaml"
    job.write_text(yaml.safe_dump({**JOB, "data": {**JOB["data"], "source": str(text)}}))
    return job


def environment() -> dict[str, str]:
    """In which the command line finds our packages, installed or not."""
    return os.environ | environment_paths()


def environment_paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@dataclass
class Drive:
    """`concertina train` in a process of its own. `address` of a cluster, or None for one it starts itself."""

    folder: Path
    words: Sequence[str]
    storage: Path
    address: str | None = None
    pids: set[int] = field(default_factory=set)
    lab: Lab | None = None
    """On whose first host it runs."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        where = ["--storage", str(self.storage), *(["--address", self.address] if self.address else [])]
        with self._file("out").open("w") as out, self._file("err").open("w") as err:
            command = [sys.executable, "-m", "jobs.cli", "train", *self.words, *where]
            self.process = subprocess.Popen(
                command if self.lab is None else self.lab.command(0, command),
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env=environment() if self.lab is None else self.lab.environment() | environment_paths(),
                start_new_session=True,
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"driver.{name}"

    @property
    def out(self) -> str:
        return self._file("out").read_text()

    @property
    def err(self) -> str:
        return self._file("err").read_text()

    @property
    def lines(self) -> list[str]:
        return self.err.strip().splitlines()

    # -- the run ------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> RunFolder:
        found = re.search(r"^(?:resuming )?run (\S+) ", self.err, re.MULTILINE)
        assert found, self.err
        return RunFolder(self.storage / found[1])

    def events(self, *kinds: EventType) -> list[Event]:
        return [e for e in read_events(self.run.events_file) if not kinds or e.type in kinds]

    def steps(self) -> dict[int, float]:
        """Loss of every step that stands; fails when one is there twice or missing."""
        found: dict[int, float] = {}
        for event in self.events(EventType.START, EventType.ROLLBACK, EventType.STEP):
            limit = void_after(event)
            found = found if limit is None else {step: loss for step, loss in found.items() if step <= limit}
            if event.type == EventType.STEP:
                assert event.step is not None
                assert event.step not in found, f"step {event.step} twice"
                found[event.step] = float(event.data["loss"])
        newest = max(found, default=0)
        missing = sorted(set(range(1, newest + 1)) - found.keys())
        assert not missing, f"steps {missing} of {newest} are missing"
        assert list(found) == list(range(1, newest + 1)), "not in order"
        return found

    def states(self) -> list[str]:
        return [event.data["state"] for event in self.events(EventType.STATE)]

    def journal(self) -> dict[str, Any]:
        """Where the coordinator and its members are; waits until they have seats. Remembers their processes."""

        def read() -> dict[str, Any]:
            try:
                return dict(json.loads(self.run.journal_file.read_text()))
            except FileNotFoundError:
                return {}

        self.wait(lambda: read().get("seatings"))
        found = read()
        self.pids |= {found["coordinator_pid"], *found["pids"].values()}
        return found

    def recoveries(self) -> list[Recovery]:
        return [Recovery.from_json(event.data) for event in self.events(EventType.RECOVERY)]

    def lost(self) -> dict[int, str]:
        """Members that were lost, and why."""
        news = [MemberNews.from_json(event.data) for event in self.events(EventType.MEMBER)]
        return {told.member: told.reason for told in news if told.what is MemberWhat.LOST}

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, condition: Any, bound_s: float = 150.0) -> None:
        """Until it holds; a driver that has ended meanwhile fails at once, with its words."""

        def holds() -> bool:
            ended = self.process.poll() is not None
            try:
                return bool(condition())
            finally:
                assert not ended or condition(), f"the driver ended with {self.process.returncode}:\n{self.err}"

        wait_until(holds, bound_s)

    def said(self, text: str) -> None:
        self.wait(lambda: text in self.err)

    def reaches(self, step: int) -> None:
        """Until so many steps are committed."""
        self.wait(lambda: re.search(r"^(?:resuming )?run ", self.err, re.MULTILINE))
        self.wait(lambda: any((event.step or 0) >= step for event in self.events(EventType.STEP)))
        self.journal()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, bound_s: float = 150.0) -> int:
        """Its exit code."""
        return self.process.wait(bound_s)

    def clean_up(self) -> None:
        """After a test that failed: as a person would, then by force."""
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(15)
                except subprocess.TimeoutExpired:
                    continue


def alive(pids: Iterator[int] | set[int]) -> set[int]:
    """Those that are processes, zombies apart."""
    found = set()
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
        except psutil.NoSuchProcess:
            continue
    return found
