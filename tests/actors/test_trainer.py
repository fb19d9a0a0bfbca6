"""Does a member that obeys stay one when what it was asked for fails, and the run can do without? No Ray here, and a
coordinator that nobody reaches."""

from __future__ import annotations

import time
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
from concertina.state.manifest import partial_folder
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
    """Of the only member of generation 0, which has its share of the beginning."""
    text = tmp_path / "text.txt"
    text.write_text("a fold and another one\n" * 400)
    data = {"source": str(text), "sequence_length": 12, "tokenizer": {"vocab_size": 300}}
    job = tiny_job(model__vocab_size=300, data=data)
    corpus = prepare(job.data, tmp_path, 300)
    plan = RunPlan("a-1", tmp_path, corpus, job, Layout(1), "cpu", "session", "token")
    link = Phases(ChannelClient(("127.0.0.1", 1), "token", 0))
    made = Trainer(Assignment(plan, 0, ("127.0.0.1", 1)), link, "127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    made.hear(encode(Prepare(0, ALONE.to_json(), ("127.0.0.1", store.port), fresh=True)))
    made._take_seat(Move(0))
    link.phases.clear()
    return made


def no_room(*_: object) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 7 bytes")


def test_who_keeps_its_state_says_that_it_writes(trainer: Trainer) -> None:
    trainer._keep(KEEP)
    assert trainer.link.phases == ["checkpoint", "halted"]  # type: ignore[attr-defined]
    folder = partial_folder(trainer.seat.plan.checkpoints, 0, 5)
    wait_until(lambda: any(folder.glob("part-*.json")))


def test_who_trains_says_where_its_time_goes_now_and_then(trainer: Trainer) -> None:
    link, sheet = trainer.link, trainer.loop.sheet
    for _ in range(3):
        sheet.begin_step()
        time.sleep(0.01)
        sheet.end_step()
        link.spent(sheet)
    (said,) = link.said(TimeSpent)  # type: ignore[attr-defined]
    assert (said.member, said.inside) == (0, "productive")
    assert said.seconds["productive"] >= 0.01
    link._said_s -= SAY_TIME_EVERY_S
    link.spent(sheet)
    assert len(link.said(TimeSpent)) == 2  # type: ignore[attr-defined]


def test_no_room_for_a_copy_ends_nobody(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.engine.state = no_room  # type: ignore[method-assign]
    trainer._keep(KEEP)
    assert trainer.link.said(RankError) == []  # type: ignore[attr-defined]
    assert "can't allocate memory" in caplog.text
    assert trainer.link.phases == ["checkpoint", "halted"]  # type: ignore[attr-defined]
    trainer._report("")
    (halted,) = trainer.link.said(Halted)  # type: ignore[attr-defined]
    assert (halted.generation, halted.step) == (0, 0), "it has what it had"
