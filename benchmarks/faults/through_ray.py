"""python -m benchmarks.faults.through_ray: as on bare processes, and nodes, their agents and coordinators go as well.

`concertina train` on a cluster of our own, struck by what `concertina chaos` strikes with. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.faults.found import Found, Strike, count_bells
from benchmarks.faults.subject import BOUND_S, WORLD, Hung, Tail, job_document
from benchmarks.recovery.concertina import Run
from benchmarks.recovery.ray_train import Nodes, Settings, set_environment
from benchmarks.recovery.watch import own_all
from concertina.errors import UserError
from concertina.track.events import EventType, read_events
from concertina.track.run import RunFolder
from infra.processes import end_descendants, is_alive, start_time

if TYPE_CHECKING:
    from actors.injector import Injector
    from concertina.elastic.chaos import Scene

__all__ = ["main", "through_ray"]

_POLL_S = 0.1
_STEPS_OF_REST = 5
_MOST_PAUSE_S = 0.5
_SAY_EVERY = 10
_PHASES = ("step", "validation", "checkpoint", "halted", "preparing", "prepared", "moving", "verified", "adopted")
_KINDS = {
    "rank killed": 40,
    "rank killed in a phase": 15,
    "node killed": 20,
    "agent killed": 9,
    "coordinator killed": 9,
    "rank frozen": 4,
    "two ranks killed": 3,
}


class _Run(Run):
    """The driver of a run of ours, and what it has written."""

    def __init__(self, folder: Path, address: str) -> None:
        super().__init__(folder, address, {"ep": 2})

    def _document(self, text: Path, layout: dict[str, int]) -> dict[str, Any]:
        return job_document(text, self._storage, layout, standbys=1)


class _Struck:
    """A run at the hands of who breaks it."""

    def __init__(self, folder: Path, nodes: Nodes, run: _Run) -> None:
        from actors.injector import Injector
        from infra.cluster_access import ClusterAccess

        self.nodes, self.run = nodes, run
        deadline = time.monotonic() + BOUND_S
        while run.folder is None:
            run.check()
            if time.monotonic() > deadline:
                raise Hung(f"no run within {BOUND_S:.0f} s")
            time.sleep(_POLL_S)
        self.folder: RunFolder = run.folder
        access = ClusterAccess(nodes.address)
        access.connect(f"concertina-{self.folder.run_id}")
        own_all()  # ray.init brings a handler of SIGTERM
        self._make = lambda: Injector(self.folder, access, lambda strike: None)
        self.injector: Injector = self._make()
        self._tail = Tail(self.folder.events_file)
        self.ready: set[int] = set()
        self._gone: set[int] = set()
        self.pids: dict[int, float] = {}  # of members there ever were, and when they began
        self._step = self._whole_since = 0

    # -- who is there -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        for event in self._tail.read():
            if event["type"] == EventType.STEP:
                self._step = event["step"]
                if event["data"]["world"] != WORLD:
                    self._whole_since = self._step
            elif event["type"] == EventType.GENERATION:
                self._whole_since = self._step
            elif event["type"] == EventType.ROLLBACK:
                self._step = self._whole_since = event["data"]["to_step"]
            elif event["type"] == EventType.MEMBER:
                who = self.ready if event["data"]["what"] == "ready" else self._gone
                who.add(event["data"]["member"])

    @property
    def lost(self) -> set[int]:
        """Of those that could take a seat: one that was to begin on a node that had just gone is lost as well."""
        return self.ready & self._gone

    @property
    def scene(self) -> Scene:
        return self.injector.scene()

    def await_whole(self, gone: Sequence[int] = (), coordinator: int = 0) -> None:
        """Until all ranks train again, `gone` are no members any more, and another process is the coordinator. Raises
        Hung at the bound, and what ended the run."""
        self._look()
        deadline, begin = time.monotonic() + BOUND_S, self._step + _STEPS_OF_REST
        while True:
            self.run.check()
            self._look()
            scene = self.scene
            full = len(scene.pids) == WORLD == len(scene.ranks) and not set(gone) & scene.pids.keys()
            full &= set(gone) <= self.lost and scene.coordinator != coordinator
            if full and self._step >= max(begin, self._whole_since + _STEPS_OF_REST):
                self._remember(scene)
                return
            if time.monotonic() > deadline:
                raise Hung(f"not whole without {sorted(gone)} within {BOUND_S:.0f} s: step {self._step}, {scene}")
            time.sleep(_POLL_S)

    def _remember(self, scene: Scene) -> None:
        for pid in scene.pids.values():
            began_s = start_time(pid)
            if began_s is not None:
                self.pids[pid] = began_s

    @property
    def left(self) -> int:
        """Processes of members that are there still."""
        return sum(is_alive(pid, began) for pid, began in self.pids.items())

    def leave(self) -> None:
        """The cluster, which goes on."""
        import ray

        ray.shutdown()

    # -- faults -------------------------------------------------------------------------------------------------------

    def strike(self, kind: str, random: Random) -> set[int]:
        """Whom it should have cost, once the run is whole again."""
        scene = self.scene
        ranks = random.sample(range(WORLD), 2)
        members = [scene.ranks[rank] for rank in ranks]
        match kind:
            case "rank killed" | "rank frozen":
                self._do(f"{'kill' if kind == 'rank killed' else 'freeze'} member={members[0]}")
                return self._without(members[:1])
            case "two ranks killed":
                for member in members:
                    self._do(f"kill member={member}")
                return self._without(members)
            case "rank killed in a phase":
                return self._in_a_phase(members, random.choice(_PHASES))
            case "node killed":
                node = scene.nodes[members[0]]
                on_it = [member for member, where in scene.nodes.items() if where == node]
                self.nodes.kill_id(node)
                self.nodes.add()
                return self._without(on_it)
            case "agent killed":
                self._do(f"kill agent={scene.order.index(scene.nodes[members[0]])}")
                self.await_whole()
            case "coordinator killed":
                self._do("kill coordinator")
                self.await_whole(coordinator=scene.coordinator)
        return set()

    def _do(self, line: str, injector: Injector | None = None) -> None:
        from concertina.elastic.chaos import parse

        (injector or self.injector).carry_out(parse(line))

    def _without(self, members: Sequence[int]) -> set[int]:
        self.await_whole(members)
        return set(members)

    def _in_a_phase(self, members: list[int], phase: str) -> set[int]:
        """One dies when it comes to that phase; of a change another one's death makes it."""
        first, second = members
        fuse = self._in_thread(f"kill member={first} phase={phase}")
        if phase in ("step", "validation", "checkpoint"):
            fuse()
            return self._without([first])
        self._do(f"kill member={second}")
        fuse()
        return self._without(members)

    def _in_thread(self, line: str) -> Callable[[], None]:
        """Begun when this returns; what it returns waits for its end."""
        thread = threading.Thread(target=self._do, args=(line, self._make()), daemon=True)
        thread.start()
        thread.join(1.0)

        def end() -> None:
            thread.join(BOUND_S)
            if thread.is_alive():
                raise Hung(f"{line!r} did not come about within {BOUND_S:.0f} s")

        return end


def through_ray(folder: Path, faults: int, seed: int) -> Found:
    """So many faults on one run, and what it made of them."""
    set_environment(folder, Settings())
    found, random = Found("Ray, ep 2"), Random(seed)
    nodes = Nodes(folder)
    run = _Run(folder, nodes.address)
    struck = _Struck(folder, nodes, run)
    try:
        struck.await_whole()
        for number in range(faults):
            time.sleep(random.uniform(0, _MOST_PAUSE_S))
            _strike(struck, random, found)
            if (number + 1) % _SAY_EVERY == 0:
                print(f"Ray: {number + 1} faults", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - hours of faults are not lost for one; it counts as a run that hangs
        found.broken_off = str(error) if isinstance(error, UserError) else repr(error)
        print(f"Ray: broken off: {found.broken_off}", file=sys.stderr, flush=True)
    session = str(json.loads(struck.folder.journal_file.read_text())["session"])
    run.stop()
    found.left = struck.left + count_bells(session)
    losses = found.read(list(read_events(struck.folder.events_file)))
    struck.leave()
    nodes.shutdown()
    if not found.broken_off:
        found.deviation = _again(struck.folder, losses)
    return found


def _strike(struck: _Struck, random: Random, found: Found) -> None:
    kind = random.choices(list(_KINDS), list(_KINDS.values()))[0]
    before, began_s = set(struck.lost), time.monotonic()
    expected = struck.strike(kind, random)
    new, seconds = struck.lost - before, time.monotonic() - began_s
    found.strikes.append(Strike(kind, tuple(sorted(expected)), tuple(sorted(new)), seconds))


def _again(folder: RunFolder, losses: dict[int, float]) -> Any:
    from benchmarks.faults.proof import again
    from concertina.data import prepare

    job = folder.job()
    corpus = prepare(job.data, Path(job.storage_path), job.model.vocab_size)
    return again(job, corpus, folder.checkpoints, losses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Strike, and print what became of the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.through_ray", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    own_all()
    try:
        with tempfile.TemporaryDirectory(prefix="faults-ray-") as name:
            found = through_ray(Path(name), options.faults, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        end_descendants(timedelta(seconds=10))
    print(json.dumps(found.to_json(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
