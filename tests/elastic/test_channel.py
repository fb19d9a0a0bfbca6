"""Does the supervision channel prove both ends, tell each message once, and see a death at once?"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from concertina.elastic.channel import ChannelClient, ChannelServer
from concertina.elastic.channel.wire import new_nonce, prove, to_line
from concertina.elastic.waits import BOUNDS
from concertina.errors import RankFailure
from tests.waiting import wait_until

pytestmark = pytest.mark.unit

TOKEN = "a token of this test"
LOOPBACK = "127.0.0.1"

# A member in a process of its own: says one thing, beats, and holds the interpreter from then on when asked to.
PROGRAM = """
import sys, time
from concertina.elastic.channel import ChannelClient
client = ChannelClient(("127.0.0.1", int(sys.argv[1])), sys.argv[2], member=1)
client.start(lambda document: None)
client.progress(7, "step")
client.send({"hello": "from a process"})
time.sleep(600)
"""


class Ear:
    """A coordinator's callbacks: everything in order of arrival."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.messages: list[dict[str, Any]] = []

    def heard(self, member: int, document: dict[str, Any]) -> None:
        self.messages.append(document)
        self.events.put(("heard", member, document))

    def lost(self, member: int, evidence: str) -> None:
        self.events.put(("lost", member, evidence))

    def next(self) -> tuple[Any, ...]:
        return self.events.get(timeout=20)


class Hall:
    """Servers and clients of one test, closed at its end."""

    def __init__(self) -> None:
        self._closers: list[Callable[[], None]] = []

    def server(self, ear: Ear, received: dict[str, int] | None = None, heard: Any = None) -> ChannelServer:
        server = ChannelServer(LOOPBACK, TOKEN, heard or ear.heard, ear.lost, received)
        self._closers.append(server.close)
        return server

    def client(
        self, address: tuple[str, int], member: int = 0, token: str = TOKEN
    ) -> tuple[ChannelClient, list[dict[str, Any]]]:
        client, told = ChannelClient(address, token, member), []
        client.start(told.append)
        self._closers.append(client.close)
        return client, told

    def close(self) -> None:
        for close in reversed(self._closers):
            close()


@pytest.fixture
def hall() -> Iterator[Hall]:
    made = Hall()
    yield made
    made.close()


def greet(address: tuple[str, int], token: str = TOKEN, **changes: Any) -> socket.socket:
    """A client of the test's own, up to and with its greeting."""
    connection = socket.create_connection(address, timeout=10)
    first = json.loads(connection.makefile().readline())
    hello = {"member": 0, "pid": 1, "incarnation": "i", "server": "", "heard": 0} | changes
    nonce = new_nonce()
    mac = prove(token, "client", first["nonce"], nonce, hello)
    connection.sendall(to_line({"hello": hello, "nonce": nonce, "mac": mac}))
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closed it; reads what came before."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_messages_come_in_order_and_words_go_back(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    client, told = hall.client(server.address)
    for index in range(500):
        client.send({"index": index})
    assert client.flush(timedelta(seconds=20))
    assert [message["index"] for message in ear.messages] == list(range(500))
    server.send(0, {"stop": True})
    server.send(0, {"checkpoint": True})
    wait_until(lambda: len(told) == 2)
    assert told == [{"stop": True}, {"checkpoint": True}]
    assert server.connected()[0].pid == os.getpid()


def test_what_is_in_no_hurry_goes_with_a_heartbeat_and_keeps_its_place(hall: Hall) -> None:
    ear = Ear()
    client, _ = hall.client(hall.server(ear).address)
    client.send({"index": 0}, at_once=False)
    wait_until(lambda: len(ear.messages) == 1)
    for index in range(1, 9):
        client.send({"index": index}, at_once=index % 3 == 0)
    assert client.flush(timedelta(seconds=20))
    assert [message["index"] for message in ear.messages] == list(range(9))


def test_it_listens_on_its_address_only() -> None:
    for anywhere in ("", "0.0.0.0", "::"):
        with pytest.raises(ValueError, match="one address of this node"):
            ChannelServer(anywhere, TOKEN, Ear().heard, Ear().lost)


def test_a_word_to_a_member_that_is_not_there_yet_waits_for_it(hall: Hall) -> None:
    server = hall.server(Ear())
    server.send(3, {"stop": True})
    _, told = hall.client(server.address, member=3)
    wait_until(lambda: told == [{"stop": True}])


def test_the_wrong_token_gets_nothing(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    stranger, _ = hall.client(server.address, member=1, token="another")
    stranger.send({"let me": "in"})
    friend, _ = hall.client(server.address, member=0)
    friend.send({"I am": "known"})
    assert friend.flush(timedelta(seconds=20))
    assert ear.messages == [{"I am": "known"}]
    assert set(server.connected()) == {0}
    assert not stranger.is_connected
    assert is_closed(greet(server.address, token="another"))


def test_a_recorded_greeting_is_worth_nothing(hall: Hall) -> None:
    server = hall.server(Ear())
    first = socket.create_connection(server.address, timeout=10)
    recorded = prove(TOKEN, "client", "an older nonce", "n", {})
    hello = {"member": 0, "pid": 1, "incarnation": "i", "server": "", "heard": 0}
    first.sendall(to_line({"hello": hello, "nonce": "n", "mac": recorded}))
    assert is_closed(first)
    assert server.connected() == {}


def test_a_false_server_hears_nothing(hall: Hall) -> None:
    heard: list[bytes] = []
    with socket.create_server((LOOPBACK, 0)) as false:
        client, _ = hall.client(false.getsockname()[:2])
        client.send({"a": "secret"})
        connection, _ = false.accept()
        connection.sendall(to_line({"nonce": "x", "server": "false"}))
        heard.append(connection.recv(4096))
        connection.sendall(to_line({"acked": 0, "mac": "0" * 64}))
        wait_until(lambda: is_closed(connection))
    assert b"secret" not in heard[0]
    assert TOKEN.encode() not in heard[0]
    assert not client.is_connected
    assert client.silent_s > 0


HELLO = {"member": 0, "pid": 1, "incarnation": "i", "server": "", "heard": 0}
GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": b"\x00\xff\n",
    "deep": b"[" * 4000 + b"\n",
    "list": b"[]\n",
    "long": b"x" * 10_000,
    "types": b'{"hello": {"member": "0"}}\n',
    "half a character": b'{"hello": %s, "nonce": "n", "mac": "\\ud800"}\n' % json.dumps(HELLO).encode(),
    "deep nonce": b'{"hello": %s, "nonce": %s, "mac": "m"}\n' % (json.dumps(HELLO).encode(), b"[" * 970 + b"]" * 970),
    "a rank of old": b'{"hello": {"rank": 0, "generation": 0, "pid": 1, "incarnation": "i", "server": ""}}\n',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_cut_off_and_harms_nobody(hall: Hall, garbage: bytes) -> None:
    ear = Ear()
    server = hall.server(ear)
    client, _ = hall.client(server.address)
    wait_until(lambda: client.is_connected)
    with socket.create_connection(server.address, timeout=10) as stranger:
        stranger.sendall(garbage)
        assert is_closed(stranger)
    client.send({"still": "here"})
    assert client.flush(timedelta(seconds=20))
    assert ear.messages == [{"still": "here"}]
    assert server.broken is None


def test_silent_strangers_hold_up_nobody_and_are_dropped(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    strangers = [socket.create_connection(server.address, timeout=20) for _ in range(100)]
    client, _ = hall.client(server.address)
    client.send({"past": "them"})
    assert client.flush(timedelta(seconds=20))
    assert all(is_closed(stranger) for stranger in strangers)
    assert ear.messages == [{"past": "them"}]
    assert ear.events.qsize() == 1  # nobody was lost who had never proved himself


@pytest.mark.parametrize(("hold", "wanted"), [("time.sleep(600)", "idle"), ("while True: pass", "busy")])
def test_a_killed_process_is_lost_at_once(hall: Hall, hold: str, wanted: str) -> None:
    ear = Ear()
    server = hall.server(ear)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = PROGRAM.replace("time.sleep(600)", hold)
    process = subprocess.Popen([sys.executable, "-c", program, str(server.address[1]), TOKEN], env=environment)
    assert ear.next() == ("heard", 1, {"hello": "from a process"})
    wait_until(lambda: server.silences()[1].step == 7)
    process.send_signal(signal.SIGKILL)
    kind, who, evidence = ear.next()
    assert (kind, who) == ("lost", 1)
    assert evidence in ("eof", "reset")
    assert not server.silences()
    process.wait()


def test_a_frozen_process_is_silent_and_not_lost(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(server.address[1]), TOKEN], env=environment)
    assert ear.next()[0] == "heard"
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: server.silences()[1].suspicious)
    assert server.silences()[1].phase == "step"
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not server.silences()[1].suspicious)
    assert ear.events.empty()
    process.kill()
    assert ear.next()[:2] == ("lost", 1)
    process.wait()


def test_a_goodbye_is_no_loss(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    client, _ = hall.client(server.address)
    client.send({"last": "words"})
    wait_until(lambda: client.is_connected)
    assert client.flush(timedelta(seconds=20))
    client.close()
    wait_until(lambda: not server.connected())
    assert ear.next() == ("heard", 0, {"last": "words"})
    assert ear.events.empty()


def test_a_member_that_comes_again_replaces_its_old_connection(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    old = greet(server.address)
    wait_until(lambda: 0 in server.connected())
    new = greet(server.address, incarnation="j")
    assert is_closed(old)
    wait_until(lambda: server.connected()[0].incarnation == "j")
    assert ear.events.empty()
    new.close()
    assert ear.next()[:2] == ("lost", 0)


def test_a_new_server_elsewhere_gets_every_message_once(hall: Hall) -> None:
    """The coordinator restarts five times, each time at another port, while two members go on talking."""
    ear = Ear()
    server = hall.server(ear)
    clients = [hall.client(server.address, member)[0] for member in (0, 1)]
    done = threading.Event()

    def talk(client: ChannelClient, member: int) -> None:
        for index in range(2000):
            client.send({"member": member, "index": index})
            if index % 20 == 0:
                done.wait(0.005)

    talkers = [threading.Thread(target=talk, args=(client, member)) for member, client in enumerate(clients)]
    for talker in talkers:
        talker.start()
    for _ in range(5):
        heard = len(ear.messages)
        wait_until(lambda heard=heard: len(ear.messages) > heard or not any(t.is_alive() for t in talkers))
        server.close()
        server = hall.server(ear, received=server.received)
        for client in clients:
            client.move_to(server.address)
    for talker in talkers:
        talker.join()
    assert all(client.flush(timedelta(seconds=30)) for client in clients)
    for member in (0, 1):
        assert [m["index"] for m in ear.messages if m["member"] == member] == list(range(2000))


def test_what_was_heard_but_never_acknowledged_is_not_heard_again(hall: Hall) -> None:
    """The connection broke between the hearing and the acknowledgement: the member must say it again."""
    ear = Ear()
    server = hall.server(ear)
    for _ in range(2):
        with greet(server.address) as member:
            member.sendall(to_line({"seq": 1, "say": {"first": 1}}))
            wait_until(lambda: server.received.get("i") == 1)
    other = hall.server(ear, received=server.received)
    with greet(other.address) as member:
        acked = json.loads(member.makefile().readline())["acked"]
        member.sendall(to_line({"seq": 1, "say": {"first": 1}}) + to_line({"seq": 2, "say": {"second": 2}}))
        wait_until(lambda: other.received == {"i": 2})
    assert acked == 1
    assert ear.messages == [{"first": 1}, {"second": 2}]


def test_a_process_with_many_open_files_still_talks(hall: Hall) -> None:
    """`select` knows no descriptor above 1023; a member may have more, files of its data among them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft == resource.RLIM_INFINITY else max(soft, 2048), hard))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        ear = Ear()
        server = hall.server(ear)
        client, told = hall.client(server.address)
        client.send({"still": "here"})
        assert client.flush(timedelta(seconds=5))
        server.send(0, {"stop": True})
        wait_until(lambda: told == [{"stop": True}])
        assert min(many) < 1024 < max(many)
    finally:
        for each in many:
            os.close(each)


def test_words_come_once_over_a_broken_connection(hall: Hall) -> None:
    """Nobody hears a word twice, whether the connection broke or the server began anew."""
    ear = Ear()
    server = hall.server(ear)
    client, told = hall.client(server.address)
    server.send(0, {"word": 1})
    wait_until(lambda: told == [{"word": 1}])
    client.move_to(server.address)  # cuts the connection and comes again
    server.send(0, {"word": 2})
    wait_until(lambda: told == [{"word": 1}, {"word": 2}])
    other = hall.server(ear)
    other.send(0, {"word": 1})
    client.move_to(other.address)
    wait_until(lambda: told == [{"word": 1}, {"word": 2}, {"word": 1}])


def test_a_member_that_is_expelled_hears_no_more_and_is_not_heard(hall: Hall) -> None:
    ear = Ear()
    server = hall.server(ear)
    client, told = hall.client(server.address, member=1)
    other, _ = hall.client(server.address, member=0)
    wait_until(lambda: client.is_connected and other.is_connected)
    server.expel(1)
    wait_until(lambda: client.is_expelled)
    wait_until(lambda: not client.is_connected)
    server.send(1, {"an": "order"})
    client.send({"too": "late"})
    assert not client.flush(timedelta(seconds=0.1))
    other.send({"still": "here"})
    assert other.flush(timedelta(seconds=20))
    assert ear.messages == [{"still": "here"}]
    assert ear.events.qsize() == 1, "who was expelled is not lost as well"
    assert told == []
    assert not other.is_expelled


def test_an_expelled_member_that_was_away_learns_it_when_it_comes_back(hall: Hall) -> None:
    """It stood still meanwhile, or the network did. What it wanted to say counts no more."""
    ear = Ear()
    server = hall.server(ear)
    server.expel(3)
    late, told = hall.client(server.address, member=3)
    late.send({"too": "late"})
    wait_until(lambda: late.is_expelled)
    server.send(3, {"an": "order"})
    assert is_closed(greet(server.address, member=3, incarnation="another life of it"))
    assert not late.is_connected
    assert (ear.messages, told) == ([], [])
    assert 3 not in server.connected()


def test_a_stranger_cannot_say_that_a_member_is_expelled(hall: Hall) -> None:
    with socket.create_server((LOOPBACK, 0)) as false:
        client, _ = hall.client(false.getsockname()[:2])
        connection, _ = false.accept()
        connection.sendall(to_line({"nonce": "x", "server": "false"}))
        connection.recv(4096)
        connection.sendall(to_line({"expelled": True, "mac": "0" * 64}))
        wait_until(lambda: is_closed(connection))
    assert not client.is_expelled


def test_members_learn_how_far_the_run_is_written_down(hall: Hall) -> None:
    server = hall.server(Ear())
    client, _ = hall.client(server.address)
    assert client.recorded == 0
    server.recorded = 7
    client.send({"a": "message"})
    wait_until(lambda: client.recorded == 7)
    server.recorded = 9  # and without a message: beats are answered as well
    wait_until(lambda: client.recorded == 9)


def test_steps_that_are_done_again_are_not_written_down_any_more(hall: Hall) -> None:
    """After a roll back: members must keep what they know of the steps that follow."""
    server = hall.server(Ear())
    client, _ = hall.client(server.address)
    server.recorded = 7
    wait_until(lambda: client.recorded == 7)
    server.recorded = 5
    wait_until(lambda: client.recorded == 5)


def test_a_member_knows_for_how_long_nobody_was_there(hall: Hall) -> None:
    server = hall.server(Ear())
    client, _ = hall.client(server.address)
    wait_until(lambda: client.is_connected and client.silent_s < 0.5)
    server.close()
    wait_until(lambda: client.silent_s > 0.6)
    assert not client.is_connected


def test_a_queue_that_nobody_empties_is_an_error() -> None:
    client = ChannelClient((LOOPBACK, 1), TOKEN, member=2)
    for index in range(10_000):
        client.send({"index": index})
    with pytest.raises(RankFailure, match="none of this member's last 10000 messages") as raised:
        client.send({"one": "more"})
    assert raised.value.data["rank"] == 2


def test_the_bounds_of_the_channel_fit_a_beat() -> None:
    assert BOUNDS["silence"].seconds >= 10 * 0.2


def test_messages_are_answered_at_once_and_beats_only_now_and_then(hall: Hall) -> None:
    """An answer wakes the member's thread, and what it says of beats is worth little."""
    server = hall.server(Ear())
    with greet(server.address) as member:
        for step in range(1, 21):
            member.sendall(
                to_line({"beat": {"step": step, "phase": "step", "age_s": 0.0, "heard": 0, "done": 0, "busy_s": 0.0}})
            )
            wait_until(lambda step=step: 0 in server.silences() and server.silences()[0].step == step)
        server.recorded = 5
        member.sendall(to_line({"seq": 1, "say": {"a": "message"}}))
        answers = member.makefile()
        assert "acked" in json.loads(answers.readline())
        found = [json.loads(answers.readline())]
        while found[-1]["ack"] == 0:
            found.append(json.loads(answers.readline()))
    assert found[-1] == {"ack": 1, "recorded": 5}
    assert 1 < len(found) < 20, "the first beat is answered, and not each"
