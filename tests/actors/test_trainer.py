"""Does a member that obeys stay one when what it was asked for fails, and the run can do without, and begin with the
weights it was given whenever it begins? No Ray here, and a coordinator that nobody reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from actors.assignment import Assignment, RunPlan
from actors.link import SAY_TIME_EVERY_S, RankLink
from actors.rank_log import Stamp
from actors.trainer import Trainer
from concertina.data.prepare import prepare
from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.messages import Halted, Keep, Message, Move, Prepare, RankError, TimeSpent, decode, encode
from concertina.layout import Layout, Seating
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from tests.train.worlds import tiny_job
from tests.waiting import wait_until

pytestmark = pytest.mark.dist

ALONE = Seating(Layout(1), (0,), (None,))
KEEP = Keep(generation=5, source=0, present=[0], step=0)


class Phases(RankLink):
    """A link that remembers what it said of the training thread."""

    def __init__(self, client: ChannelClient) -> None:
        super().__init__(client, Stamp(0))
        self.phases: list[str] = []
        client.progress = lambda step, phase: self.phases.append(phase)  # type: ignore[method-assign]

    def said(self, kind: type[Message]) -> list[Any]:
        return [message for message in map(decode, self.client.unacknowledged()) if isinstance(message, kind)]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return beginning(tmp_path)


def beginning(tmp_path: Path, **changes: Any) -> Trainer:
    """Of the only member of generation 0, which has its share of the beginning."""
    text = tmp_path / "text.txt"
    text.write_text("a fold and another one\n" * 400)
    data = {"source": str(text), "sequence_length": 12, "tokenizer": {"vocab_size": 300}}
    job = tiny_job(model__vocab_size=300, data=data, **changes)
    corpus = prepare(job.data, tmp_path, 300)
    plan = RunPlan("a-1", tmp_path, corpus, job, Layout(1), "cpu", "session", "token")
    link = Phases(ChannelClient(("127.0.0.1", 1), "token", 0))
    made = Trainer(Assignment(plan, 0, ("127.0.0.1", 1)), link, "127.0.0.1")
    seat(made, Move(0))
    link.phases.clear()
    return made


def seat(trainer: Trainer, move: Move) -> None:
    """It is told to take a seat, the only one, and does."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    fresh = move.generation == 0
    trainer.hear(encode(Prepare(move.generation, ALONE.to_json(), ("127.0.0.1", store.port), fresh=fresh)))
    trainer._take_seat(move)


def no_room(*_: object) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 7 bytes")


def test_who_keeps_its_state_says_that_it_writes(trainer: Trainer) -> None:
    trainer._keep(KEEP)
    assert trainer.link.phases == ["checkpoint", "halted"]  # type: ignore[attr-defined]
    folder = partial_folder(trainer.seat.plan.checkpoints, 0, 5)
    wait_until(lambda: any(folder.glob("part-*.json")))


def test_who_trains_says_where_its_time_goes_now_and_then(trainer: Trainer) -> None:
    link, sheet = trainer.link, trainer.loop.sheet
    before = len(link.said(TimeSpent))  # type: ignore[attr-defined]
    for step in range(1, 4):
        sheet.begin_step()
        wait_until(lambda least_s=0.01 * step: sheet.totals().get("productive", 0.0) >= least_s)
        sheet.end_step()
        link.spent(sheet)
    (said,) = link.said(TimeSpent)[before:]  # type: ignore[attr-defined]
    assert (said.member, said.inside) == (0, "productive")
    assert said.seconds["productive"] >= 0.01
    link._said_s -= SAY_TIME_EVERY_S
    link.spent(sheet)
    assert len(link.said(TimeSpent)) == before + 2  # type: ignore[attr-defined]


def test_no_room_for_a_copy_ends_nobody(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.engine.state = no_room  # type: ignore[method-assign]
    trainer._keep(KEEP)
    assert trainer.link.said(RankError) == []  # type: ignore[attr-defined]
    assert "can't allocate memory" in caplog.text
    assert trainer.link.phases == ["checkpoint", "halted"]  # type: ignore[attr-defined]
    trainer._report("")
    (halted,) = trainer.link.said(Halted)  # type: ignore[attr-defined]
    assert (halted.generation, halted.step) == (0, 0), "it has what it had"


def weights_of(trainer: Trainer) -> dict[str, Any]:
    state = trainer.engine.state()
    return {key: boxed.piece.clone() for key, boxed in state.items() if key.startswith("master/")}


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def trained(trainer: Trainer, root: Path, steps: int) -> tuple[Path, dict[str, Any]]:
    """Its checkpoint after so many steps, and its weights."""
    for step in range(1, steps + 1):
        trainer.engine.train_step(step)
    trainer.engine.settle()
    write_part(partial_folder(root, steps, 0), trainer.engine.state(), rank=0, world=1, generation=0)
    assert commit(root, steps, 0, trainer.engine.facts()) is not None
    return checkpoint_folder(root, steps), weights_of(trainer)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Another run's."""
    return trained(beginning(tmp_path), tmp_path / "base", 3)


def test_a_run_begins_with_the_weights_it_starts_from(tmp_path: Path, base: tuple[Path, dict[str, Any]]) -> None:
    folder, weights = base
    assert alike(weights_of(beginning(tmp_path, checkpoint__initial_load_path=str(folder))), weights)
    assert not alike(weights_of(beginning(tmp_path)), weights)


def test_when_all_is_lost_before_a_checkpoint_it_begins_with_them_again(
    tmp_path: Path, base: tuple[Path, dict[str, Any]]
) -> None:
    """The share of the new generation was made for state to be moved in: neither start values nor trained weights may
    be left of it."""
    folder, weights = base
    trainer = beginning(tmp_path, checkpoint__initial_load_path=str(folder))
    losses = [trainer.engine.train_step(step).loss for step in (1, 2)]
    assert not alike(weights_of(trainer), weights)
    seat(trainer, Move(1))
    assert (trainer.engine.applied, trainer.engine.optimizer.updates) == (0, 0)
    assert alike(weights_of(trainer), weights)
    assert [trainer.engine.train_step(step).loss for step in (1, 2)] == losses


def test_with_a_checkpoint_of_its_own_it_never_loads_them_again(
    tmp_path: Path, base: tuple[Path, dict[str, Any]]
) -> None:
    folder, weights = base
    trainer = beginning(tmp_path, checkpoint__initial_load_path=str(folder))
    own, own_weights = trained(trainer, tmp_path / "own", 2)
    seat(trainer, Move(1, step=2, checkpoint=str(own)))
    assert alike(weights_of(trainer), own_weights)
    assert not alike(own_weights, weights)
    assert (trainer.engine.applied, trainer.engine.optimizer.updates) == (2, 2)
