"""How are all gloo groups of a rank formed at once, and how is that given up half-way?

Gloo's own way is one group after another, each of which asks the store for every peer. Here each group's constructor
runs in a thread and meets a store of its own in this process. What it has to say to its peers is collected, goes to
the real store in one message a rank, and theirs is handed to the constructors: one round for all groups, over one
device (a port, a thread) a rank.

A constructor that waits for a peer cannot be interrupted from Python, but it can be answered: `_Forming.abandon`
tells it of peers that are not there, and connects to its port in their stead, so that it ends.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from concertina.parallel.fence import Address
from concertina.parallel.forming import Call, Place

__all__ = ["form_gloo"]

log = logging.getLogger("concertina.parallel")

_LOOK_S, _LOOK_AT_MOST_S = 0.0005, 0.02  # between two looks at what cannot be waited for together with a fence
_LATER = timedelta(seconds=5)
"""By how much gloo's own patience with a connection exceeds ours. When gloo loses it, it frees what the connection's
arrival is to be told to, and an arrival after that crashes the process (seen)."""

_NOBODY = 1 << 30  # the number of a connection that gloo never comes to


def form_gloo(places: list[Place], call: Call) -> list[Any]:
    """A backend for each place. Every rank of every group must call it with the same key.

    Raises torch's DistError or gloo's RuntimeError when a peer does not come, dies, or the wires are cut meanwhile:
    then soon (mostly within 130 ms), and nothing of it is left.
    """
    if not places:
        return []
    forming = _Forming(places, call)
    try:
        return forming.run()
    except BaseException:
        forming.abandon()
        raise


class _Forming:
    """All groups of one rank on their way."""

    def __init__(self, places: list[Place], call: Call) -> None:
        self._call = call
        device = dist.ProcessGroupGloo.create_device(hostname=call.hostname, lazy_init=False)
        self._makings = [_Making(place, device, call.timeout) for place in places]

    def run(self) -> list[Any]:
        call, makings = self._call, self._makings
        own = {making.place.name: making.introduction().hex() for making in makings}
        listening = {makings[0].address}
        call.wires.forming(listening)
        call.store.set(f"{call.key}/{call.rank}", json.dumps(own))
        peers = sorted({rank for making in makings for rank in making.place.ranks} - {call.rank})
        said = {rank: json.loads(text) for rank, text in zip(peers, self._hear(peers), strict=True)}
        for rank in peers:
            shared = next(making.place.name for making in makings if rank in making.place.ranks)
            listening.add(_Introduction.of(bytes.fromhex(said[rank][shared])).address)
        call.wires.forming(listening)
        for making in makings:
            for position, rank in enumerate(making.place.ranks):
                if rank != call.rank:
                    making.tell(position, bytes.fromhex(said[rank][making.place.name]))
        self._join()
        call.wires.formed(listening)
        return [making.result() for making in makings]

    def _hear(self, peers: list[int]) -> list[bytes]:
        call = self._call
        keys = [f"{call.key}/{rank}" for rank in peers]
        deadline_s, look_s = time.monotonic() + call.timeout.total_seconds(), _LOOK_S
        while not call.store.check(keys):
            call.wires.check()
            if time.monotonic() > deadline_s:
                missing = [rank for rank, key in zip(peers, keys, strict=True) if not call.store.check([key])]
                raise dist.DistStoreError(f"ranks {missing} did not come to form groups in {call.timeout}")
            time.sleep(look_s)
            look_s = min(1.2 * look_s, _LOOK_AT_MOST_S)
        return call.store.multi_get(keys)

    def _join(self) -> None:
        deadline_s = time.monotonic() + self._call.timeout.total_seconds()
        for making in self._makings:
            while making.thread.is_alive():
                making.thread.join(_LOOK_AT_MOST_S)
                self._call.wires.check()
                if time.monotonic() > deadline_s:
                    raise dist.DistNetworkError(f"{making.place} was not connected in {self._call.timeout}")
            making.result()  # raises what it raised

    def abandon(self) -> None:
        """End every constructor that is still under way, and let go of all."""
        self._call.wires.fence()
        while alive := [making for making in self._makings if making.thread.is_alive()]:
            for making in alive:
                making.release()
            self._call.wires.shut_down()
            time.sleep(_LOOK_S)
        for making in self._makings:
            making.forget()
        self._makings.clear()


class _Making:
    """One group's constructor, in a thread of its own."""

    def __init__(self, place: Place, device: Any, timeout: timedelta) -> None:
        self.place = place
        self._store = dist.HashStore()
        self._store.set_timeout(timeout + _LATER)
        self._timeout = timeout
        self._settings = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        self._settings._timeout = timeout + _LATER
        self._settings._devices = [device]
        self._backend: Any = None
        self._error: BaseException | None = None
        self._own: _Introduction | None = None
        self._released = False
        self.thread = threading.Thread(target=self._make, name=f"form-{place.name}", daemon=True)
        self.thread.start()

    def _make(self) -> None:
        place = self.place
        try:
            backend = dist.ProcessGroupGloo(self._store, place.position, len(place.ranks), self._settings)
            backend._set_default_timeout(self._timeout)
            self._backend = backend
        except BaseException as error:  # noqa: BLE001 - raised by `result`, in the thread that asked for the group
            self._error = error
            self._store.set(self._key(place.position), "")  # nobody waits for it any more

    @staticmethod
    def _key(position: int) -> str:
        return f"0/{position}"  # gloo's: number of the device, position in the group

    @property
    def address(self) -> Address:
        assert self._own is not None
        return self._own.address

    def introduction(self) -> bytes:
        """What gloo says of this rank to its peers in the group."""
        said = self._store.get(self._key(self.place.position))
        if not said:
            self.result()
        self._own = _Introduction.of(said)
        return said

    def tell(self, position: int, introduction: bytes) -> None:
        self._store.set(self._key(position), introduction)  # type: ignore[arg-type] # takes bytes as well

    def result(self) -> Any:
        """The backend, or what went wrong."""
        if self._error is not None:
            raise self._error
        return self._backend

    def release(self) -> None:
        """Answer, once, whatever the constructor may wait for: words of peers, and connections from them."""
        own_key = self._key(self.place.position)
        if self._released or not self._store.check([own_key]):
            return
        self._released = True
        if self._error is None:
            own = self._own or _Introduction.of(self._store.get(own_key))
            others = [position for position in range(len(self.place.ranks)) if position != self.place.position]
            for position in others:
                if not self._store.check([self._key(position)]):
                    self.tell(position, own.of_nobody())
            for position in others:
                own.connect(position)

    def forget(self) -> None:
        """Let go of what went wrong: its traceback holds this object, and with it gloo's threads."""
        self._error = self._backend = None


@dataclass(frozen=True)
class _Introduction:
    """What gloo says of a rank: (host name, socket address and a number, the number each peer's connection is known
    by), each with its length before it. Read of torch 2.13; a test forms groups with it."""

    head: bytes
    address: Address
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, said: bytes) -> _Introduction:
        (name_length,) = struct.unpack_from("=Q", said)
        (length,) = struct.unpack_from("=Q", said, 8 + name_length)
        start = 16 + name_length
        raw, rest = said[start : start + length], said[start + length :]
        (family,) = struct.unpack_from("=H", raw)
        (port,) = struct.unpack_from("!H", raw, 2)
        packed = raw[4:8] if family == socket.AF_INET else raw[8:24]
        host = socket.inet_ntop(family, packed)
        return cls(said[: start + length], (host, port), struct.unpack(f"={len(rest) // 8}q", rest))

    def of_nobody(self) -> bytes:
        """Of a peer that listens where this rank does, and that will be waited for."""
        return self.head + struct.pack(f"={len(self.numbers)}q", *[_NOBODY] * len(self.numbers))

    def connect(self, position: int) -> None:
        """To this rank's own port, in the stead of a peer."""
        with suppress(OSError), socket.create_connection(self.address, timeout=_LOOK_AT_MOST_S) as connection:
            connection.sendall(struct.pack("=q", self.numbers[position]))
