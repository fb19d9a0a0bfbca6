"""Is all written down in order and once, and is nobody taken for lost, when storage takes its time?"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.book import Book
from actors.recorder import Recorder
from concertina.elastic.channel import ChannelClient, ChannelServer
from concertina.elastic.messages import Committed, Evaluated, Finished, Message, PartWritten, decode, encode
from concertina.elastic.states import RunEvent, RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import RankFailure
from concertina.state.manifest import (
    FileRecord,
    Part,
    list_checkpoints,
    partial_folder,
    record_file,
    record_part,
)
from concertina.track.events import EventLog, EventType, read_events
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


class Desk:
    """A coordinator's channel, book and recorder, and one member; the page of its part is not to be read yet."""

    def __init__(self, folder: Path) -> None:
        self.log = EventLog(folder / "events.jsonl", "run-1")
        self.log.append(EventType.START, {"session": "s", "resumed_from_step": None})
        self.book = Book(self.log, folder / "checkpoints", keep=2)
        self.book.sit(0, 1, 0)
        self.told: list[Message | None] = []
        self.recorder = Recorder(self.book, self._recorded)
        self.server = ChannelServer("127.0.0.1", "token", self._heard, lambda member, why: None)
        self.client = ChannelClient(self.server.address, "token", 0)
        self.client.start(lambda document: None)

    def _heard(self, member: int, document: dict[str, Any]) -> Any:
        return self.recorder.put(decode(document))

    def _recorded(self, message: Message | None) -> None:
        self.server.recorded = self.book.recorded
        self.told.append(message)

    def write_part(self, step: int) -> Path:
        """A rank has written its part; storage does not give the page of it before somebody lets it (`release`)."""
        folder = partial_folder(self.book.checkpoints, step, 0)
        folder.mkdir(parents=True)
        (folder / "shard-0").write_text("bytes")
        record: FileRecord = record_file(folder / "shard-0")
        boxes = {"w": ((0,), (4,))}
        part = Part(rank=0, world=1, generation=0, file="shard-0", record=record, boxes=boxes, shapes={"w": (4,)})
        record_part(folder, part)
        page = folder / "part-00000.json"
        page.rename(folder / "written")
        os.mkfifo(page)
        return page

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.client.send(encode(message))

    def events(self) -> list[tuple[str, int | None]]:
        kinds = {EventType.STEP, EventType.EVAL, EventType.CHECKPOINT, EventType.ERROR, EventType.STATE}
        return [(event.type, event.step) for event in read_events(self.log.path) if event.type in kinds]

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.recorder.close()
        self.log.close()


def release(page: Path) -> None:
    """Storage gives the page after all."""
    page.write_text(page.with_name("written").read_text())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


def part(step: int) -> PartWritten:
    return PartWritten(0, 0, step, {"step": step})


def test_slow_storage_holds_up_neither_the_channel_nor_the_run(desk: Desk) -> None:
    page = desk.write_part(1)
    desk.say(Committed(1, {"loss": 1.0}), part(1), Committed(2, {"loss": 2.0}), Evaluated(2, 3.0))
    wait_until(lambda: desk.client.recorded == 1)
    for step in (7, 8):
        desk.client.progress(step, "step")
        wait_until(lambda step=step: desk.server.silences()[0].step == step)
    desk.book.move(RunEvent.CAPACITY)  # a loss is written down at once as well
    assert desk.book.state is RunState.FORMING
    assert desk.events() == [("step", 1), ("state", 1)]
    assert decode(desk.client.unacknowledged()[0]) == part(1)
    assert desk.server.recorded == desk.client.recorded == 1
    release(page)
    assert desk.client.flush(timedelta(seconds=20))
    wait_until(lambda: desk.client.recorded == 2)
    assert desk.events() == [("step", 1), ("state", 1), ("checkpoint", 1), ("step", 2), ("eval", 2)]


def test_who_relies_on_the_books_waits_till_they_are_whole(desk: Desk) -> None:
    """A checkpoint whose parts are all told is one to go back to."""
    page = desk.write_part(1)
    desk.say(Committed(1, {"loss": 1.0}), part(1), Committed(2, {"loss": 2.0}))
    wait_until(lambda: desk.client.recorded == 1)
    wait_until(lambda: desk.recorder._queue.qsize() == 1)
    threading.Timer(0.2, release, (page,)).start()
    desk.book.catch_up()
    assert (desk.book.newest_checkpoint(), desk.book.recorded) == (1, 2)


def test_what_is_queued_at_the_end_is_written(desk: Desk) -> None:
    messages = [Committed(step, {"loss": 1.0}) for step in range(1, 201)]
    for message in [*messages, Finished(0, 200, "done")]:
        desk.recorder.put(message)
    desk.recorder.close()
    assert [step for kind, step in desk.events() if kind == "step"] == list(range(1, 201))
    assert desk.told == [*messages, Finished(0, 200, "done")]


def test_far_too_much_that_nobody_records_ends_the_run_in_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BOUNDS, "recorder_full", replace(BOUNDS["recorder_full"], seconds=0.1))
    recorder, answer, begun = Recorder(desk.book, desk.told.append, most=2), threading.Event(), threading.Event()
    recorder.do(lambda: (begun.set(), answer.wait(20))[0])
    assert begun.wait(20)
    for step in (1, 2):
        recorder.put(Committed(step, {"loss": 1.0}))
    with pytest.raises(RankFailure, match=r"none of the last 2 records in 0.1 s: is it full, or does it hang\?"):
        recorder.put(Committed(3, {"loss": 1.0}))
    answer.set()
    recorder.close()
    assert desk.book.recorded == 2


def test_what_cannot_be_written_is_never_acknowledged(desk: Desk) -> None:
    desk.say(Committed(1, {"loss": 1.0}))
    assert desk.client.flush(timedelta(seconds=20))
    os.close(desk.log._fd)  # as if the disk were gone
    desk.say(Committed(2, {"loss": 1.0}), Committed(3, {"loss": 1.0}))
    wait_until(lambda: desk.recorder.broken is not None)
    assert desk.told[-1] is None, "whoever watches is woken"
    assert not desk.client.flush(timedelta(seconds=0.5))
    assert len(desk.client.unacknowledged()) == 2
    assert desk.recorder.drain()
    desk.log._fd = os.open(desk.log.path, os.O_RDWR)
    assert list_checkpoints(desk.book.checkpoints) == []
