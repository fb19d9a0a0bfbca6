"""Does the server of the channel outlast whoever holds it up, and say so when it cannot?"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.elastic.test_channel import Ear, Hall, greet, is_closed
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


@pytest.fixture
def hall() -> Iterator[Hall]:
    made = Hall()
    yield made
    made.close()


def test_a_member_that_is_expelled_while_it_hears_harms_nobody(hall: Hall) -> None:
    """Its connection is closed in the same turn of the server's thread in which it could be written to again."""
    ear, entered, gate = Ear(), threading.Event(), threading.Event()

    def heard(member: int, document: dict[str, Any]) -> None:
        if "wait" in document:
            entered.set()
            gate.wait(20)
        ear.heard(member, document)

    server = hall.server(ear, heard=heard)
    client, _ = hall.client(server.address, member=1)
    slow = greet(server.address, member=0)
    slow.settimeout(20)
    wait_until(lambda: set(server.connected()) == {0, 1})
    while not server._peers[0].out:  # till the sockets are full: the rest waits until it can be written to
        server.send(0, {"more": "x" * 2**16})
        wait_until(lambda: server._tasks.empty())
    client.send({"wait": True})
    assert entered.wait(20)
    server.expel(0)
    threading.Timer(0.3, gate.set).start()
    assert is_closed(slow)
    client.send({"still": "here"})
    assert client.flush(timedelta(seconds=20))
    assert server.broken is None


def test_while_the_server_is_held_up_nobody_falls_silent(hall: Hall) -> None:
    """It has not listened meanwhile: that it heard nothing says nothing."""
    ear, entered, gate = Ear(), threading.Event(), threading.Event()

    def heard(member: int, document: dict[str, Any]) -> None:
        entered.set()
        gate.wait(20)

    server = hall.server(ear, heard=heard)
    clients = [hall.client(server.address, member)[0] for member in (0, 1)]
    wait_until(lambda: len(server.silences()) == 2)
    clients[0].send({"write": "this"})
    assert entered.wait(20)
    before = server.silences()
    clients[1].progress(9, "step")
    time.sleep(0.5)  # more than two beats
    assert server.silences() == before
    gate.set()
    wait_until(lambda: server.silences()[1].step == 9)
    assert not any(silence.suspicious for silence in server.silences().values())


def test_what_is_still_being_written_is_acknowledged_later_and_in_order(hall: Hall) -> None:
    ear, receipts = Ear(), [threading.Event() for _ in range(2)]
    waits = {1: receipts[0], 3: receipts[1]}

    def heard(member: int, document: dict[str, Any]) -> threading.Event | None:
        ear.heard(member, document)
        return waits.get(document["number"])

    def kept() -> list[int]:
        return [document["number"] for document in client.unacknowledged()]

    server = hall.server(ear, heard=heard)
    client, _ = hall.client(server.address)
    for number in range(5):
        client.send({"number": number})
    wait_until(lambda: len(ear.messages) == 5)
    wait_until(lambda: kept() == [1, 2, 3, 4])
    receipts[1].set()
    before = server._peers[0]
    client.move_to(server.address)  # it comes again, and says again what is not acknowledged
    wait_until(lambda: server._peers.get(0) not in (None, before))
    client.send({"number": 5})
    wait_until(lambda: len(ear.messages) > 5)
    assert [message["number"] for message in ear.messages] == list(range(6)), "each is heard once all the same"
    assert kept() == [1, 2, 3, 4, 5]
    receipts[0].set()
    assert client.flush(timedelta(seconds=20))


def test_a_server_that_cannot_go_on_says_why(hall: Hall) -> None:
    """What a callback raises is the end of it: who listens there must know that nobody does any more."""

    def heard(member: int, document: dict[str, Any]) -> None:
        raise OSError("the disk is full")

    server = hall.server(Ear(), heard=heard)
    client, _ = hall.client(server.address)
    assert server.broken is None
    client.send({"write": "this"})
    wait_until(lambda: isinstance(server.broken, OSError))
    assert not client.flush(timedelta(seconds=0.1)), "it is not acknowledged"
