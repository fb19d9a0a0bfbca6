"""One run, who breaks it, and how it must end: what do tests of broken runs share?

The oracle is one process alone that trains the same job: same losses, each step once, whoever was killed meanwhile.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors

from actors.assignment import agent_name, member_name
from actors.injector import Injector, Strike
from concertina.elastic.account import Account, Bucket
from concertina.elastic.chaos import parse
from concertina.layout import Seating
from concertina.state.manifest import list_checkpoints, read_manifest
from concertina.track.events import EventType
from concertina.track.ledger import LedgerTally
from infra import LocalCluster
from tests.actors.drive import ENDLESS, Drive, environment
from tests.waiting import wait_until

__all__ = ["BOUND_S", "FOUR", "NO_CHECKPOINT", "PATIENT", "NothingLeft", "Reference", "Stage", "trained_alone"]

FOUR = ("--set", ENDLESS, "--set", "cluster.num_workers=4", "--set", "training.eval_every_steps=100000")
NO_CHECKPOINT = ("--set", "checkpoint.every_steps=100000")
PATIENT = ("--set", "elastic.max_losses_per_node=100")
BOUND_S = 120.0

Reference = Callable[[int], dict[int, float]]
NothingLeft = Callable[[Drive], None]


def trained_alone(ground: Path) -> Callable[[int], dict[int, float]]:
    """Losses of the job on one process alone, at least up to a step."""
    steps_file = ground / "alone.jsonl"
    words = [ENDLESS, "layout.ep=1", f"storage_path={ground / 'alone'}", "checkpoint.every_steps=100000"]
    words.append("training.eval_every_steps=100000")
    command = [sys.executable, "-m", "concertina.train.standalone", str(ground / "tiny.yaml")]
    command += [word for key in words for word in ("--set", key)]

    def until(step: int) -> dict[int, float]:
        process = subprocess.Popen([*command, "--steps-file", str(steps_file)], env=environment())
        try:
            wait_until(lambda: steps_file.exists() and len(steps_file.read_text().splitlines()) > step, 300)
        finally:
            process.kill()
            process.wait()
        found = [json.loads(line) for line in steps_file.read_text().splitlines()[:step]]
        steps_file.unlink()
        return {line["step"]: line["loss"] for line in found}

    return until


class Stage:
    """One run and who breaks it."""

    def __init__(self, drive: Drive, cluster: LocalCluster) -> None:
        self.drive = drive
        self.strikes: list[Strike] = []
        drive.reaches(3)
        self.injector = Injector(drive.run, cluster.access, self.strikes.append)

    def do(self, line: str) -> None:
        self.injector.carry_out(parse(line))

    def command(self, *words: str) -> dict[str, object]:
        """The same as a person does it; what it says it did."""
        run = self.drive.run
        line = [sys.executable, "-m", "jobs.cli", "chaos", run.run_id, *words, "--storage", str(run.storage)]
        done = subprocess.run([*line, "-o", "json"], env=environment(), capture_output=True, text=True, timeout=BOUND_S)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def lay(self, line: str) -> threading.Thread:
        """Carry it out in a thread: its fuse is laid when this returns."""
        own = Injector(self.drive.run, self.injector.access, self.strikes.append)
        thread = threading.Thread(target=own.carry_out, args=(parse(line),), daemon=True)
        thread.start()
        thread.join(1.0)
        return thread

    def members(self) -> dict[int, int]:
        """Members to their processes, by rank; one that was just lost may still have a seat, and no process."""
        scene = self.injector.scene()
        self.drive.pids |= {scene.coordinator, *scene.pids.values()}
        return {member: scene.pids[member] for member in scene.ranks if member in scene.pids}

    def seating(self) -> Seating:
        seatings = json.loads(self.drive.run.journal_file.read_text())["seatings"]
        return Seating.from_json(seatings[max(seatings, key=int)])

    def pair(self, fatal: bool) -> tuple[int, int]:
        """Two members, the first never of rank 0: with `fatal` they own both copies of something."""
        seating = self.seating()
        for one in (1, 2, 3):
            for other in range(4):
                both = seating.seconds[one] == other or seating.seconds[other] == one
                if one != other and both is fatal:
                    return seating.members[one], seating.members[other]
        raise AssertionError(seating)

    def engines(self) -> dict[int, tuple[int, int]]:
        """(pid, engine) of every member that has a rank: what a survivor keeps."""
        return {member: self.engine(member) for member in self.members()}

    def engine(self, member: int) -> tuple[int, int]:
        """Its process and its engine, whether it has a rank, or a seat, or neither."""
        actor = ray.get_actor(member_name(self._session, member), self.injector.namespace)
        facts = ray.get(actor.describe.remote(), timeout=BOUND_S)
        self.drive.pids.add(facts["pid"])
        return facts["pid"], facts["engine"]

    def named(self) -> set[int]:
        """All members and standbys that Ray has, also those that are still on their way."""
        prefix = member_name(self._session, 0).removesuffix("0")
        names = [n["name"] for n in list_named_actors(all_namespaces=True) if n["namespace"] == self.injector.namespace]
        return {int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}

    @property
    def _session(self) -> str:
        return str(json.loads(self.drive.run.journal_file.read_text())["session"])

    def agent(self, node: str) -> int:
        """Its process."""
        actor = ray.get_actor(agent_name(self._session, node), self.injector.namespace)
        return int(ray.get(actor.describe.remote(), timeout=BOUND_S)["pid"])

    def recoveries(self) -> int:
        return len(self.drive.events(EventType.RECOVERY))

    def settles(self, after: int, world: int | None = None) -> None:
        """More than `after` recoveries are written down, steps go on after the last, in a world of so many ranks."""
        drive = self.drive

        def goes_on() -> bool:
            kinds = (EventType.RECOVERY, EventType.STEP, EventType.GENERATION)
            events, seen, steps, now = drive.events(*kinds), 0, 0, 0
            for event in events:
                if event.type == EventType.STEP:
                    steps += 1
                    continue
                seen, steps = seen + (event.type == EventType.RECOVERY), 0
                now = event.data["world"] if event.type == EventType.GENERATION else now
            return seen > after and steps > 2 and world in (None, now)

        drive.wait(goes_on, BOUND_S)

    def ends_well(self, reference: Callable[[int], dict[int, float]], left: Callable[[Drive], None]) -> None:
        """Stopped with Ctrl-C it leaves a checkpoint of its last step, every step once, books that balance, and nothing
        else."""
        self.members()
        self.drive.send(signal.SIGINT)
        assert self.drive.ends() == 103, self.drive.err
        found = self.drive.steps()
        assert found == pytest.approx(reference(len(found)), rel=1e-10, abs=0)
        newest = read_manifest(list_checkpoints(self.drive.run.checkpoints)[-1]).step
        assert newest == list(found)[-1]
        self._balances()
        left(self.drive)

    def account(self) -> Account:
        """Where members' time went."""
        tally = LedgerTally()
        for event in self.drive.events():
            tally.add(event)
        account = tally.total()
        assert account is not None
        return account

    def _balances(self) -> None:
        """Every second of every member that there ever was has its bucket."""
        account = self.account()
        assert account.members >= len(self.drive.lost())
        assert account.is_balanced, (account.imbalance, account.share(Bucket.OTHER), account.to_json())
