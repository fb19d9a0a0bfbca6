"""python -m benchmarks.recovery.concertina --events 20: how long does Concertina stand still when a process is killed,
when a node goes, when either freezes, and when one comes?

`concertina train` on a cluster of our own: a head without CPUs and four nodes of one. Each event is followed by the
return of a full world, whose first step is a join's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.recovery import faults
from benchmarks.recovery.account import JOIN, Seated, join_of, join_record, kept_of, own_of
from benchmarks.recovery.model import SUBJECT, job_of_subject
from benchmarks.recovery.notices import NOTICE, TAKEN_BACK, notice_event, taken_back_event
from benchmarks.recovery.ray_train import MOST, ROOT, Nodes, Settings, set_environment
from benchmarks.recovery.roster import Roster
from benchmarks.recovery.stall import Line
from benchmarks.recovery.watch import Watch, document_of, own_all
from concertina.errors import UserError
from concertina.track.events import EventType, read_events
from concertina.track.run import RunFolder
from infra.processes import end_descendants

__all__ = ["main", "measure"]

LAYOUTS = {"data-parallel": {}, "folded": {"ep": 2}}
KINDS = ("process killed", "node killed", "process frozen", "node frozen", NOTICE, TAKEN_BACK)
HALVES = {"faults": KINDS[:4], "notices": KINDS[4:]}
NODE_KINDS = ("node killed", "node frozen", NOTICE)


class Run:
    """The driver of one run, and what it has written."""

    def __init__(self, folder: Path, address: str, layout: dict[str, int]) -> None:
        self._storage = folder / "runs"
        self._log = folder / "driver.log"
        job = self._job(folder, layout)
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "jobs.cli", "train", str(job), "--address", address]
            self._process = self._start(command, log)
        self._clocks_s = time.time() - time.monotonic()

    def _start(self, command: list[str], log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def _job(self, folder: Path, layout: dict[str, int]) -> Path:
        text = folder / "text"
        text.mkdir()
        for path in sorted((ROOT / "platform").rglob("*.py")):
            (text / f"{len(list(text.iterdir()))}.txt").write_text(path.read_text())
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(self._document(text, layout)))
        return path

    def _document(self, text: Path, layout: dict[str, int]) -> dict[str, Any]:
        document = job_of_subject().model_dump(mode="json", exclude_unset=True)
        document["data"] |= {"source": str(text), "tokenizer": {"vocab_size": 512}}
        document["training"] |= {"steps": 1_000_000, "eval_every_steps": 1_000_000}
        document |= {
            "storage_path": str(self._storage),
            "layout": layout,
            "cluster": {"num_workers": MOST, "num_nodes": MOST, "device": "cpu"},
            "checkpoint": {"every_steps": 1_000_000},
            "elastic": {"max_losses_per_node": 1_000_000},
        }
        return document

    @property
    def folder(self) -> RunFolder | None:
        found = list(self._storage.glob("*/events.jsonl"))
        return RunFolder(found[0].parent) if found else None

    def lines(self) -> list[Line]:
        """Every step's, by its first rank."""
        folder = self.folder
        if folder is None:
            return []
        steps = [event for event in read_events(folder.events_file) if event.type == EventType.STEP]
        return sorted(
            (
                Line(float(e.data["applied_at_s"]) - self._clocks_s, 0, 0, int(e.data["world"]), e.step or 0)
                for e in steps
            ),
            key=lambda line: line.at_s,
        )

    def recoveries(self) -> list[dict[str, Any]]:
        """What the coordinator itself says of each change."""
        folder = self.folder
        assert folder is not None
        return [dict(e.data) for e in read_events(folder.events_file) if e.type == EventType.RECOVERY]

    def losses(self, since_s: float) -> list[dict[str, Any]]:
        """Members that were lost since then."""
        folder = self.folder
        assert folder is not None
        since_ns = (since_s + self._clocks_s) * 1e9
        events = [e for e in read_events(folder.events_file) if e.type == EventType.MEMBER and e.ts_ns > since_ns]
        return [dict(event.data) for event in events if event.data["what"] == "lost"]

    def check(self) -> None:
        """Raises UserError when the driver has ended."""
        if self._process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-4000:]
            raise UserError(f"concertina train ended with {self._process.returncode}:\n{tail}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


class EventWatch(Watch):
    """Eyes on a run that writes events."""

    def __init__(self, run: Run, bound_s: float) -> None:
        super().__init__(Path(), bound_s, run.check)
        self._run = run

    def lines(self) -> list[Line]:
        return self._run.lines()


def measure(events: int, kinds: Sequence[str], layout: str, bound_s: float, keep: Path | None) -> dict[str, Any]:
    """Samples of every kind, what the coordinator said, how many samples were planned, and why there are fewer; None
    when there are not.

    Raises UserError when the run does not begin: then there is nothing to break.
    """
    samples: list[dict[str, Any]] = []
    broken_off = None
    with tempfile.TemporaryDirectory(prefix="recovery-own-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        set_environment(Path(name), Settings())
        try:
            nodes = Nodes(Path(name))
            run = Run(folder, nodes.address, LAYOUTS[layout])
            watch = EventWatch(run, bound_s)
            watch.settle(MOST)
            assert run.folder is not None
            roster = Roster(run.folder, nodes.address)
            for number, kind in product(range(events), kinds):
                found = _event(run, watch, nodes, roster, kind, number)
                samples += found
                broken_off = next((sample["error"] for sample in found if "error" in sample), None)
                if broken_off is not None:
                    break  # the next one would hit a world that is not whole
            said = run.recoveries()
            roster.leave()
            run.stop()
            nodes.shutdown()
        finally:
            end_descendants(timedelta(seconds=10))
    planned = events * sum(1 if kind == TAKEN_BACK else 2 for kind in kinds)  # others with the join after them
    return {"samples": samples, "recoveries": said, "planned": planned, "broken_off": broken_off}


def _event(run: Run, watch: EventWatch, nodes: Nodes, roster: Roster, kind: str, number: int) -> list[dict[str, Any]]:
    """One fault, and the join that makes the world whole again: two samples, whatever happens."""
    watch.pause()
    before, old = roster.seated(), len(run.recoveries())
    victim = before[number % len(before)]
    of_node = kind in NODE_KINDS
    hit = {one.member for one in before if one == victim or (of_node and one.node == victim.node)}
    outage: dict[str, Any] = {"kind": kind, "recovered": False} | kept_of(before, [], hit)
    join: dict[str, Any] = {"kind": JOIN, "recovered": False}
    whose = {"of": "node" if of_node else "process"}
    if kind == TAKEN_BACK:
        return [outage | taken_back_event(run, roster, victim, old) | kept_of(before, roster.seated(), ())]
    try:
        if kind == NOTICE:
            outage |= notice_event(run, watch, nodes, victim, old)
            since_s = nodes.add().at_s
        else:
            fault = _strike(nodes, kind, victim)
            outage |= watch.outage(fault)
            since_s = _bring_node(watch, nodes, kind, victim) if of_node else fault.at_s
        watch.settle(MOST)
        records = run.recoveries()[old:]
        outage |= own_of([said for said in records if said["cause"]["reason"] != JOIN])
        outage |= kept_of(before, roster.seated(), hit)
        joined = join_record(records, MOST)
        join = join_of(run.lines(), joined, since_s) | own_of([] if joined is None else [joined])
    except UserError as error:
        join["error"] = str(error)
    return [outage, join | whose]


def _strike(nodes: Nodes, kind: str, victim: Seated) -> faults.Fault:
    match kind:
        case "process killed":
            return faults.kill_process(victim.pid)
        case "process frozen":
            return faults.freeze_process(victim.pid)
        case "node killed":
            return nodes.kill_id(victim.node)
    return nodes.freeze_id(victim.node)


def _bring_node(watch: EventWatch, nodes: Nodes, kind: str, victim: Seated) -> float:
    """Once the run is at ease without its victim, another node; when it was there. A frozen one goes first: one that
    woke up again would be another question, and its processes would never end."""
    if kind == "node frozen":
        nodes.kill_id(victim.node)
    watch.settle(MOST - 1)
    return nodes.add().at_s


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.concertina", description=__doc__)
    parser.add_argument("--events", type=int, default=20, help="of each kind (default 20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", choices=list(HALVES), help="one half of the kinds")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="data-parallel")
    parser.add_argument("--bound", type=float, default=120.0, help="seconds an event may take at most (default 120)")
    parser.add_argument("--keep", type=Path, help="folder for the run and the driver's log")
    options = parser.parse_args(arguments)
    own_all()
    try:
        kinds = HALVES.get(options.only, options.kinds)
        found = measure(options.events, kinds, options.layout, options.bound, options.keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    trainer = {"ray": version("ray"), "layout": options.layout, "sequences": SUBJECT.sequences}
    if found["broken_off"]:
        print(f"broken off: {found['broken_off']}", file=sys.stderr)
    more = {name: found[name] for name in ("recoveries", "planned", "broken_off")}
    print(json.dumps(document_of("Concertina", trainer, found["samples"]) | more, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
