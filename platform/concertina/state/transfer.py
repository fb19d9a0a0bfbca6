"""How does state get from members that have it to members that want it? In one all-to-all, checked at its end.

A plan says which box of which parameter goes from whom to whom; master weight and moments travel together. What a pair
exchanges is one stream: the plan's moves in its order, cut to pieces and sent in rounds of bounded size, so that no
member needs more beside its state than a round. Before the first byte everybody compares what is planned with what is
wanted and with what others plan; at the end every receiver compares the checksum of each stream with its sender's, and
one vote over the crowd says that all is well, or raises on every member.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concertina.errors import StateError
from concertina.layout import Box
from concertina.parallel.collectives import all_reduce_max, all_reduce_sum, all_to_all_v
from concertina.parallel.groups import Group

if TYPE_CHECKING:
    from concertina.layout.reshard import Move, ReshardPlan

__all__ = ["ROUND_BYTES", "Holdings", "TransferReport", "transfer"]

ROUND_BYTES = 8 << 20
"""What a member sends, and what it gets, in one round at most."""

Holdings = dict[str, list[tuple[Box, tuple[Tensor, Tensor, Tensor]]]]
"""Parameter to disjoint boxes of it, each with live storage of master weight and both moments."""

_MODULUS = (1 << 61) - 1
_FACTOR = 1_000_003
_INTEGERS = {4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TransferReport:
    """What a transfer took on this member. `bytes_local` were copied without leaving it, those that stayed in place not
    counted; `move_s` is packing, sending and unpacking, `verify_s` the checksums' exchange and the vote."""

    bytes_local: int
    bytes_sent: int
    bytes_received: int
    rounds: int
    move_s: float
    verify_s: float


def transfer(
    plan: ReshardPlan,
    member: int,
    roster: Sequence[int],
    held: Holdings,
    wanted: Holdings,
    group: Group,
    faults: Sequence[str] = (),
    round_bytes: int = ROUND_BYTES,
    before_vote: Callable[[], None] = lambda: None,
) -> TransferReport:
    """Move all that `plan` moves; every member of `roster`, which are the positions of `group`, must call it.

    `held` is only read. `wanted` is filled; nothing of it counts until this returns. `faults` are what this member
    found wrong before. Raises StateError on every member when on any one something was not as planned, or arrived
    otherwise than it was sent. `before_vote` is called when all is well here: when the vote has passed anywhere, it has
    been called everywhere.
    """
    return _Transfer(plan, member, roster, held, wanted, group, faults).run(round_bytes, before_vote)


@dataclass(frozen=True)
class _Piece:
    """A part of a stream: `size` elements of one kind of a move, and where they are here."""

    key: int
    view: Tensor

    @property
    def size(self) -> int:
        return self.view.numel()


class _Stream:
    """What goes to or comes from one member, in order, a bounded part at a time. `signature` is of what is planned,
    `checksum` of what has gone."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.size = self.signature = self.checksum = 0

    def add(self, key: int, view: Tensor, limit: int) -> None:
        for number, part in enumerate(_cut(view, limit)):
            self.pieces.append(_Piece(key + number, part))
            self.size += part.numel()
            self.signature = (self.signature * _FACTOR + key + part.numel()) % _MODULUS

    def rounds(self, limit: int) -> list[list[_Piece]]:
        """Pieces of each round; the same on both ends, which know the same sizes."""
        found: list[list[_Piece]] = []
        filled = limit
        for piece in self.pieces:
            if filled + piece.size > limit:
                found.append([])
                filled = 0
            found[-1].append(piece)
            filled += piece.size
        return found

    def count(self, piece: _Piece, flat: Tensor) -> None:
        """Take a piece that lies in `flat` into the checksum: its bits, its place in the stream, and what it is."""
        integers = _INTEGERS[flat.element_size()]
        bits = int(flat.view(integers).sum(dtype=integers))  # wraps around: no wider sum is as fast
        self.checksum = (self.checksum * _FACTOR + piece.key + bits) % _MODULUS


def _cut(view: Tensor, limit: int) -> Iterator[Tensor]:
    """Parts of at most `limit` elements, cut along the longest dimension."""
    if view.numel() <= limit or view.numel() == 1:
        yield view
        return
    dim = max(range(view.dim()), key=lambda dim: view.shape[dim])
    half = view.shape[dim] // 2
    yield from _cut(view.narrow(dim, 0, half), limit)
    yield from _cut(view.narrow(dim, half, view.shape[dim] - half), limit)


class _Transfer:
    def __init__(
        self,
        plan: ReshardPlan,
        member: int,
        roster: Sequence[int],
        held: Holdings,
        wanted: Holdings,
        group: Group,
        faults: Sequence[str],
    ) -> None:
        assert group.size == len(roster), (group, roster)
        assert group.rank == roster.index(member), "the crowd stands as the roster"
        self.plan, self.member, self.roster, self.group = plan, member, roster, group
        self.held, self.wanted = held, wanted
        self.faults = list(faults)
        self.bytes_local = 0
        some = [views[0] for boxes in (*held.values(), *wanted.values()) for _, views in boxes]
        self.like = some[0] if some else torch.empty(0, dtype=torch.float32)
        self.sending = {position: _Stream() for position in range(group.size)}
        self.receiving = {position: _Stream() for position in range(group.size)}

    def run(self, round_bytes: int, before_vote: Callable[[], None]) -> TransferReport:
        began = time.perf_counter()
        limit = max(1, round_bytes // self.like.element_size() // self._most_peers())
        self._prepare(limit)
        rounds = self._move(limit)
        moved = time.perf_counter()
        self._verify(before_vote)
        width = self.like.element_size()
        return TransferReport(
            bytes_local=self.bytes_local,
            bytes_sent=sum(stream.size for stream in self.sending.values()) * width,
            bytes_received=sum(stream.size for stream in self.receiving.values()) * width,
            rounds=rounds,
            move_s=moved - began,
            verify_s=time.perf_counter() - moved,
        )

    def _most_peers(self) -> int:
        """How many any member sends to, or gets from: they share a round. All must cut their streams alike."""
        there = {move.target for move in self.plan.moves if move.source == self.member}
        here = {move.source for move in self.plan.moves if move.target == self.member}
        most = max(1, *(len(peers - {self.member}) for peers in (there, here)))
        mine = torch.tensor([most], dtype=torch.int64, device=self.like.device)
        return int(all_reduce_max(mine, self.group).finish().item())

    def _prepare(self, limit: int) -> None:
        """Copy what stays here, and say what goes into and comes out of which stream."""
        written: dict[str, list[Box]] = {}
        for move in self.plan.moves:
            if self.member not in (move.source, move.target):
                continue
            key = zlib.crc32(f"{move.name} {move.box.start} {move.box.stop}".encode()) << 8
            here = self._views(self.held, move) if move.source == self.member else None
            there = self._views(self.wanted, move) if move.target == self.member else None
            if there is not None:
                written.setdefault(move.name, []).append(move.box)
            if here is not None and there is not None:
                self._copy(here, there)
                continue
            for kind, view in enumerate(here or there or ()):
                streams, peer = (self.sending, move.target) if here is not None else (self.receiving, move.source)
                streams[self.roster.index(peer)].add(key + (kind << 40), view, limit)
        self.faults += _gaps(self.wanted, written)

    def _views(self, holdings: Holdings, move: Move) -> tuple[Tensor, ...] | None:
        for box, views in holdings.get(move.name, ()):
            if box.contains(move.box):
                return tuple(view[move.box.slices(box)] for view in views)
        self.faults.append(f"member {self.member} does not hold {move.name} {move.box.start}:{move.box.stop}")
        return None

    def _copy(self, here: tuple[Tensor, ...], there: tuple[Tensor, ...]) -> None:
        for source, target in zip(here, there, strict=True):
            if source.data_ptr() != target.data_ptr():
                target.copy_(source)
                self.bytes_local += source.nbytes

    def _compare_plans(self) -> None:
        """Every sender tells every receiver what comes: both have planned alike, or nothing is sent. (Gloo ends a
        process that gets more than it expects.)"""
        own = torch.tensor([[stream.size, stream.signature] for stream in self.sending.values()], dtype=torch.int64)
        for position, (size, signature) in enumerate(self._swap(own.to(self.like.device)).tolist()):
            stream = self.receiving[position]
            if (size, signature) != (stream.size, stream.signature):
                alike = "the same" if size == stream.size else str(stream.size)
                self.faults.append(
                    f"member {self.roster[position]} plans to send {size} elements to member {self.member}, "
                    f"which plans for {alike} {'in another order' if size == stream.size else ''}".rstrip()
                )

    def _move(self, limit: int) -> int:
        self._compare_plans()
        leaving = [stream.rounds(limit) for stream in self.sending.values()]
        coming = [stream.rounds(limit) for stream in self.receiving.values()]
        mine = max(len(rounds) for rounds in (*leaving, *coming))
        agreed = torch.tensor([mine, len(self.faults)], dtype=torch.int64, device=self.like.device)
        rounds, faults = all_reduce_max(agreed, self.group).finish().tolist()
        if faults:
            self._raise()
        for number in range(rounds):
            self._round(
                [theirs[number] if number < len(theirs) else [] for theirs in leaving],
                [theirs[number] if number < len(theirs) else [] for theirs in coming],
            )
        return rounds

    def _round(self, leaving: list[list[_Piece]], coming: list[list[_Piece]]) -> None:
        send = [sum(piece.size for piece in pieces) for pieces in leaving]
        receive = [sum(piece.size for piece in pieces) for pieces in coming]
        buffer = self.like.new_empty(sum(send))
        for stream, piece, flat in _laid_out(self.sending, leaving, buffer):
            flat.view(piece.view.shape).copy_(piece.view)
            stream.count(piece, flat)
        if self.group.size == 1:
            return
        arrived = all_to_all_v(buffer, send, receive, self.group).finish()
        for stream, piece, flat in _laid_out(self.receiving, coming, arrived):
            stream.count(piece, flat)
            piece.view.copy_(flat.view(piece.view.shape))

    def _swap(self, rows: Tensor) -> Tensor:
        """One row to each position, one from each."""
        ones = [1] * self.group.size
        return all_to_all_v(rows, ones, ones, self.group).finish()

    def _verify(self, before_vote: Callable[[], None]) -> None:
        sums = torch.tensor([[stream.checksum] for stream in self.sending.values()], dtype=torch.int64)
        said = self._swap(sums.to(self.like.device))[:, 0].tolist()
        for position, checksum in enumerate(said):
            stream = self.receiving[position]
            if checksum != stream.checksum:
                self.faults.append(
                    f"{stream.size} elements from member {self.roster[position]} to member {self.member} have checksum "
                    f"{stream.checksum:#x}, were sent with {checksum:#x}"
                )
        if not self.faults:
            before_vote()
        vote = torch.tensor([len(self.faults)], dtype=torch.int64, device=self.like.device)
        if int(all_reduce_sum(vote, self.group).finish().item()):
            self._raise()

    def _raise(self) -> None:
        said = "; ".join(self.faults[:3]) or "another member found a fault"
        raise StateError(f"state was not moved: {said}", member=self.member, faults=len(self.faults))


def _laid_out(
    streams: dict[int, _Stream], pieces: list[list[_Piece]], buffer: Tensor
) -> Iterator[tuple[_Stream, _Piece, Tensor]]:
    """Every piece of a round with its stream and its place in the buffer, position after position."""
    offset = 0
    for position, theirs in enumerate(pieces):
        for piece in theirs:
            yield streams[position], piece, buffer[offset : offset + piece.size]
            offset += piece.size


def _gaps(wanted: Mapping[str, Sequence[tuple[Box, object]]], written: Mapping[str, Sequence[Box]]) -> list[str]:
    """What the plan does not write, or writes more than once."""
    faults = []
    for name, boxes in wanted.items():
        theirs = written.get(name, ())
        for box, _ in boxes:
            inside = [both for each in theirs if (both := box.intersect(each)) is not None]
            covered = sum(part.size for part in inside)
            twice = any(a.intersect(b) for number, a in enumerate(inside) for b in inside[number + 1 :])
            if covered != box.size or twice:
                faults.append(f"{covered} elements of {box.size} of {name} {box.start}:{box.stop} are planned")
    return faults
