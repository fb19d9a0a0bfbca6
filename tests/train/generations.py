"""Several generations of a run in processes that stay: who leaves when and how, and what the coordinator would say.

A script is a list of stages. In each the members of its seating train up to a step; then some leave, in the middle of
something or not, the others stop what hangs, tell each other where they stand, and go on in the next stage.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from concertina.config import Job
from concertina.elastic.second_owners import place_seconds
from concertina.layout import Layout, Seating, kv_copies
from concertina.layout.reshard import plan_moves
from concertina.parallel.failures import is_communication_failure
from concertina.parallel.groups import GroupOptions, form_crowd, form_groups
from concertina.train.engine import Engine, StepResult
from concertina.train.share import Share
from tests.train.ledger import NotedView, Reading
from tests.train.storage import storage_forbidden
from tests.train.worlds import unconfigured

__all__ = ["Gone", "Life", "Stage", "described", "live", "on_nodes"]

OPTIONS = {"timeout": timedelta(seconds=20)}
JOINING = timedelta(minutes=10)
Tamper = Callable[["Life", int], None]


@dataclass(frozen=True)
class Stage:
    """Train on `seating` up to step `until`; then `lost` leave as `fault` says. `behind`: who does not hear the totals.

    planned     at the boundary after `until`
    computing   they do not compute the next step: it is void
    summed      they sum its gradients and take no part in the all-reduce: void
    some        they do the all-reduce and are gone; those `behind` lose its result, the others apply the step
    """

    seating: Seating
    until: int
    lost: tuple[int, ...] = ()
    fault: str = "planned"
    behind: tuple[int, ...] = ()


def on_nodes(layout: Layout, members: dict[int, str], spares: tuple[int, ...] = ()) -> Seating:
    """`members` on the ranks of the layout in order, second owners on other nodes where there are any."""
    seconds = place_seconds(list(members.values()))
    return Seating(layout, tuple(members), seconds, spares)


class Gone(Exception):
    """This member leaves here."""


@dataclass
class Life:
    """One member's engine through the stages. Changing seats reads nothing from storage."""

    member: int
    store: Any
    job: Job
    engine: Engine
    losses: dict[int, float] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    seen: list[StepResult] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    applied_in: list[tuple[int, int]] = field(default_factory=list)
    stage: int = 0

    def __post_init__(self) -> None:
        engine = self.engine

        def read(ids: list[int]) -> None:
            lane = engine.groups["dp"].rank
            self.readings.append(Reading(self.stage, engine.applied + 1, lane, tuple(ids)))

        engine.train = NotedView(engine.train, read)  # type: ignore[assignment]

    def form(self, number: int, seating: Seating) -> tuple[Share | None, Any]:
        """An empty share on new groups, and the crowd."""
        store, rank = dist.PrefixStore(f"stage{number}", self.store), seating.rank_of(self.member)
        options = GroupOptions(generation=number, **OPTIONS)
        crowd = form_crowd(seating.roster.index(self.member), len(seating.roster), store, options)
        if rank is None:
            return None, crowd
        copies = kv_copies(self.job.model, seating.layout.tp)
        groups = form_groups(seating.layout, rank, store, options, copies)
        return self.engine.prepare(seating, rank, groups, "initial" if number == 0 else "empty"), crowd

    def enter(self, number: int, stages: list[Stage]) -> None:
        """Take one's seat in stage `number`."""
        self.stage = number
        if number == 0:
            self.begin(stages[0])
        else:
            with storage_forbidden():
                self.change_seats(number, stages)

    def await_turn(self, number: int, stages: list[Stage]) -> None:
        """Who joins comes when the others do, however long their steps take: groups form within seconds."""
        if number > 0 and self.member in stages[number - 1].seating.roster:
            self.store.set(f"turn/{number}", "")
        elif number > 0:
            self.store.wait([f"turn/{number}"], JOINING)

    def begin(self, stage: Stage) -> None:
        share, _ = self.form(0, stage.seating)
        assert share is not None
        self.engine.adopt(share)
        self.engine.fill_seconds()

    def change_seats(self, number: int, stages: list[Stage]) -> None:
        stage = stages[number]
        share, crowd = self.form(number, stage.seating)
        before, nodes = stages[number - 1], {member: str(member) for member in range(64)}
        present = set(before.seating.members) - set(before.lost)
        arguments = (self.job.model, before.seating, stage.seating, present & set(stage.seating.roster), nodes)
        plan = plan_moves(*arguments, only=self.member)
        assert not plan.missing
        self.reports.append(asdict(self.engine.move(share, stage.seating, self.member, plan, crowd)))
        self.engine.adopt(share)

    def train(self, until: int) -> None:
        while self.engine.applied < until:
            self.note(self.engine.train_step(self.engine.applied + 1))

    def note(self, result: StepResult) -> None:
        self.losses[result.step] = result.loss
        self.seen.append(result)
        if self.engine.applied == result.step:
            self.applied_in.append((result.step, self.stage))

    def fail(self, stage: Stage) -> None:
        """Begin one step more; leave, or lose one's peers."""
        engine, lost = self.engine, self.member in stage.lost
        agree = engine._agree

        def cut(vector: Any) -> list[float]:
            if stage.fault == "summed":
                raise Gone
            totals = agree(vector)
            if stage.fault == "some":  # nobody goes before all have the result
                self.store.set(f"agreed/{stage.until}/{self.member}", "")
                self.store.wait([f"agreed/{stage.until}/{member}" for member in stage.seating.members])
            if lost or self.member in stage.behind:
                raise Gone
            return totals

        if stage.fault == "some" or lost or self.member in stage.behind:
            engine._agree = cut  # type: ignore[method-assign]
        over = self._supervised(stage.until)
        try:
            if lost and stage.fault == "computing":
                raise Gone
            result = engine.train_step(stage.until + 1)
            self.note(result)
            engine.settle()
        except Gone:
            pass
        except RuntimeError as error:
            if not is_communication_failure(error):
                raise
        if lost:
            self.store.set(f"halt/{stage.until}", "")
        over.set()
        engine.groups.fence()
        engine.__dict__.pop("_agree", None)
        engine.share.abandon()

    def _supervised(self, step: int) -> threading.Event:
        """Another thread fences this member's groups when a loss is known, as the supervisor's does on `Halt`: one that
        waits for a peer that waits for somebody lost would not learn of it before gloo's timeout."""
        over, groups = threading.Event(), self.engine.groups

        def watch() -> None:
            while not over.wait(0.01):
                if self.store.check([f"halt/{step}"]):
                    groups.fence()
                    return

        threading.Thread(target=watch, daemon=True).start()
        return over

    def agree(self, number: int, stage: Stage) -> None:
        """Everybody says where it stands; those behind complete the step that others have applied."""
        engine, survivors = self.engine, [m for m in stage.seating.members if m not in stage.lost]
        said = json.dumps([engine.applied, engine.pending, engine.last_totals])
        self.store.set(f"said/{number}/{self.member}", said)
        heard = [json.loads(self.store.get(f"said/{number}/{member}")) for member in survivors]
        newest = max(applied for applied, _, _ in heard)
        if engine.applied < newest:
            totals = next(last[1] for applied, _, last in heard if applied == newest)
            assert engine.pending == newest
            self.note(engine.complete(totals))
            self.completed.append(newest)
        engine.void()


def live(rank: int, store: Any, job: Job, stages: list[Stage], tamper: Tamper | None = None) -> dict[str, Any]:
    """The life of member `rank`. `tamper` is called at the beginning of every stage."""
    life = Life(rank, store, job, unconfigured(job))
    engine = life.engine
    for number, stage in enumerate(stages):
        if rank not in stage.seating.roster:
            continue
        life.await_turn(number, stages)
        life.enter(number, stages)
        if tamper is not None:
            tamper(life, number)
        seated = stage.seating.rank_of(rank) is not None
        if seated:
            life.train(stage.until)
            if stage.fault == "planned":
                engine.settle()
            else:
                life.fail(stage)
            if rank not in stage.lost:
                life.agree(number, stage)
        if rank in stage.lost:
            break
    assert life.engine is engine
    return described(life)


def described(life: Life) -> dict[str, Any]:
    """Of a member whose engine has a share: losses, state, copies that it keeps for others."""
    engine = life.engine
    found: dict[str, Any] = {"losses": life.losses, "completed": life.completed, "reports": life.reports}
    found |= {"readings": life.readings, "applied_in": life.applied_in}
    found |= {"applied": engine.applied, "tokens": engine.tokens, "watch": engine.watch.state()}
    if engine._share is None:
        return found
    share = engine.share
    found["updates"] = engine.optimizer.updates
    found["state"] = {key: (boxed.box, boxed.piece.numpy().copy()) for key, boxed in engine.state().items()}
    found["biases"] = {key: bias.numpy().copy() for key, bias in share.held_alike().items()}
    found["copies"] = [
        (key, box, piece.numpy().copy())
        for copy in share.seconds.copies.values()
        for key, (box, piece) in copy.pieces().items()
    ]
    found["copy_updates"] = [copy.updates for copy in share.seconds.copies.values()]
    return found
