"""A run without processes: can losses, delays and restarts, in any order, make members and coordinator go wrong?

`Run` is the coordinator as `actors/regrouping.py` has it, channels that keep each member's order and nothing else, and
an observer who sees everything and says what must hold. Whoever drives it picks one of `possible_actions` at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from concertina.elastic.choice import take_seats
from concertina.elastic.generations import Generations, Order, OrderKind, Restore
from concertina.elastic.messages import Control, Formed, Halt, Halted, Keep, Message, Move, Prepare, Prepared
from concertina.errors import CapacityError
from concertina.layout import Layout, Seating
from tests.elastic.simulated_member import Broken, Chain, Member, Net, Wait

__all__ = ["Run"]

WORLDS = (1, 2, 4, 5)  # of three members one is a spare
LEAST = 2
Action = Callable[[], None]


def seats(
    present: dict[int, str], old: Seating | None, least: int = LEAST, leaving: Collection[int] = frozenset()
) -> Seating:
    """As the run's policy does. With fewer than `least` members there is none. Who is `leaving` is a spare, unless too
    few would be left."""
    staying = {member: node for member, node in present.items() if member not in leaving}
    staying = staying if len(staying) >= least else present
    worlds = [world for world in WORLDS if least <= world <= len(staying)]
    if not worlds:
        raise CapacityError(f"{len(present)} members are there")
    found = take_seats(Layout(worlds[-1]), staying, old)
    return replace(found, spares=(*found.spares, *sorted(present.keys() - staying.keys())))


@dataclass
class Channel:
    """Both directions of one member. `kept` has been heard, and is said again to a coordinator that restarts unless it
    was acknowledged."""

    orders: deque[Message] = field(default_factory=deque)
    said: deque[Message] = field(default_factory=deque)
    kept: deque[Message] = field(default_factory=deque)


class Run:
    """`kind` is the class under test. `fails`: how often a network may still fail although nobody is lost."""

    def __init__(
        self,
        kind: type[Generations] = Generations,
        members: int = 4,
        least: int = LEAST,
        seat: Callable[[dict[int, str], Seating | None], Seating] | None = None,
    ) -> None:
        self.leaving: set[int] = set()  # changed in place
        self.kind, self.least = kind, least
        self.seat = seat or partial(seats, least=least, leaving=self.leaving)
        self.generations = kind(self.seat)
        self.members: dict[int, Member] = {}
        self.channels: dict[int, Channel] = {}
        self.nodes: dict[int, str] = {}
        self.nets: dict[int, Net] = {}
        self.checkpoints: dict[str, Chain] = {}
        self.journal: tuple[dict[int, Seating], int] = ({}, -1)
        self.committed: Chain = ()
        self.numbers: list[int] = []
        self.restored = self.kept = 0
        self.keeping: dict[int, tuple[Seating, int]] = {}  # by number: of which ranks, and of which step
        self._dead: set[int] = set()
        for _ in range(members):
            self.join()

    # -- the coordinator ----------------------------------------------------------------------------------------------

    def _do(self, orders: list[Order]) -> None:
        for order in orders:
            match order.kind:
                case OrderKind.HALT:
                    self._tell(order, Halt(order.number))
                case OrderKind.PREPARE:
                    self._prepare(order)
                case OrderKind.STOP:
                    self._tell(order, Control(regroup=True))
                case OrderKind.MOVE:
                    assert order.move is not None
                    self._check_move(order.move)
                    self._write_journal()
                    self._tell(order, order.move)
                case OrderKind.KEEP:
                    self._keep(order)
                case OrderKind.RESTORE:
                    self._restore()
        self._check_bounds()

    def _prepare(self, order: Order) -> None:
        assert self.generations.coming is not None
        assert not self.numbers or order.number > self.numbers[-1], f"{order.number} after {self.numbers[-1]}"
        self.numbers.append(order.number)
        self._write_journal()
        seating, port = self.generations.coming.seating, len(self.nets)
        self.nets[port] = Net(seating)
        self._tell(order, Prepare(order.number, seating.to_json(), ("", port)))

    def _tell(self, order: Order, message: Message) -> None:
        for member in order.members:
            if not self.members[member].expelled:
                self.channels[member].orders.append(message)

    def _keep(self, order: Order) -> None:
        move = order.move
        assert move is not None
        assert move.source is not None
        self._check_move(move)
        assert order.number not in (*self.numbers, *self.keeping)
        self.keeping[order.number] = self.generations.possible[move.source], move.step
        self._write_journal()
        self._tell(order, Keep(order.number, move.source, move.present, move.step, move.totals))

    def _restore(self) -> None:
        self._check_restore()
        for member in self.members.values():
            member.written.clear()
        self.restored += bool(self.generations.possible)
        name = max(self.checkpoints, key=lambda name: len(self.checkpoints[name]), default=None)
        chain = self.checkpoints[name] if name is not None else ()
        self.committed = self.committed[: len(chain)]
        self._do(self.generations.restore(Restore(name, len(chain))))

    def _write_journal(self) -> None:
        self.journal = dict(self.generations.possible), self.generations.last_number

    def _hear(self, message: Message) -> None:
        match message:
            case Prepared():
                self._do(self.generations.prepare(message.member, message.generation, message.failure))
            case Halted():
                self._do(self.generations.halt(message))
            case Formed():
                if self.generations.form(message.member, message.generation):
                    self._check_formed(message.generation, message.step)
                    self._write_journal()

    def look(self) -> None:
        """What the coordinator begins by itself, after however long."""
        generations = self.generations
        nothing = not generations.possible and generations.coming is None
        if nothing or generations.shortage is not None:
            if len(generations.present) >= self.least:
                self._do(generations.begin())
        elif generations.is_stuck:
            self._do(generations.begin())

    # -- what befalls it ----------------------------------------------------------------------------------------------

    def join(self) -> None:
        number = len(self.members)
        channel = self.channels[number] = Channel()
        self.members[number] = Member(number, channel.said.append, self.nets, self.checkpoints)
        self.nodes[number] = f"node {number % 3}"
        self.generations.arrive(number, self.nodes[number])

    def plan(self) -> None:
        if self.generations.is_settled:
            self._do(self.generations.begin(planned=True))

    def warn(self, member: int) -> None:
        """Its node will go: it leaves with the next change."""
        self.leaving.add(member)

    def take_back(self) -> None:
        """They all stay."""
        self.leaving.clear()

    def dismiss(self) -> None:
        """Who has left ends."""
        seating = self.generations.seating
        if self.generations.is_settled and seating is not None:
            self.lose(*self.leaving.intersection(seating.spares))

    def lose(self, *members: int) -> None:
        """The coordinator holds them for lost, truly or not: it hears and tells them no more."""
        for member in members:
            self.members[member].expelled = True
        self._do(self.generations.lose([*members]))

    def die(self, member: int) -> None:
        """It is gone; the coordinator does not know yet."""
        self.members[member].thread.close()
        for net in self.nets.values():
            net.cut.add(member)
        self.channels[member].orders.clear()
        self.channels[member].said.clear()
        self._dead.add(member)

    def restart(self) -> None:
        """A new coordinator, which knows what the journal knows, and what members say they are at."""
        present = {m: self.nodes[m] for m in self.generations.present}
        self.generations = self.kind(self.seat)
        for channel in self.channels.values():
            channel.orders.clear()
            channel.said.extendleft(reversed(channel.kept))
            channel.kept.clear()
        at_work = {m: self.members[m].at_work_in for m in present if self.answers(m)}
        self._do(self.generations.reattach({m: self.nodes[m] for m in present}, *self.journal, at_work))

    def answers(self, member: int) -> bool:
        return member not in self._dead and not self.members[member].frozen

    @property
    def lost(self) -> list[int]:
        """Dead, and the coordinator has yet to learn it."""
        return [m for m in self._dead if not self.members[m].expelled]

    # -- what can happen next -----------------------------------------------------------------------------------------

    def possible_actions(self) -> list[Action]:
        """Deliveries and members' next steps: all that happens without anybody's fault."""
        found: list[Action] = []
        for number, member in self.members.items():
            channel = self.channels[number]
            if channel.said and not member.expelled:
                found.append(partial(self._deliver, number))
            if number in self._dead or member.frozen:
                continue
            if channel.orders and not member.expelled:
                found.append(lambda member=member, channel=channel: member.hear(channel.orders.popleft()))
            found += self._of_threads(member)
        if self.generations.is_stuck or self.generations.shortage or not self.generations.possible:
            found.append(self.look)
        return found

    def _deliver(self, number: int) -> None:
        channel = self.channels[number]
        message = channel.said.popleft()
        channel.kept.append(message)
        if len(channel.kept) > 3:
            channel.kept.popleft()  # acknowledged
        self._hear(message)

    def _of_threads(self, member: Member) -> list[Action]:
        found: list[Action] = []
        waits = member.waits
        for coming in member.preparing:
            roster = set(coming.seating.roster)
            if coming.net.joined[("prepare",)] >= roster and member.number not in coming.net.cut:
                found.append(partial(member.prepared, coming))
            if coming.net.cut & roster:
                found.append(partial(member.not_prepared, coming))
        net = waits.net
        if net is None:
            return found + ([partial(self._resume, member)] if waits.ready() else [])
        if net.joined[waits.op] >= waits.peers and member.number not in net.cut:
            found.append(partial(self._resume, member))
        if net.cut & waits.peers:
            found.append(partial(self._break, member))
        return found

    def breakable(self) -> list[Member]:
        """Members that wait for others, whose network may fail."""
        return [m for m in self.members.values() if self.answers(m.number) and m.waits.net is not None]

    def fail_network(self, member: Member) -> None:
        assert member.waits.net is not None
        member.waits.net.cut.add(member.number)
        self._break(member)

    def _resume(self, member: Member) -> None:
        before = len(member.applications)
        waited = member.waits
        member.waits = next(member.thread)
        self._watch(member, waited, before)

    def _break(self, member: Member) -> None:
        before = len(member.applications)
        member.waits = member.thread.throw(Broken())
        self._watch(member, member.waits, before)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _watch(self, member: Member, waited: Wait, before: int) -> None:
        """After each step of a training thread."""
        share = member.share
        if share is not None and share.whole:
            assert len(set(share.shards.values())) == 1, f"member {member.number} holds {share.shards}"
        self._look_at_kept()
        if waited.op[:1] == ("agree",) and len(member.applications) > before:
            self._commit(member, member.chain[:-1])
        if member.current is not None and share is not None and share.whole and member.applied % 3 == 0:
            self._save(member)

    def _look_at_kept(self) -> None:
        """A checkpoint that those who are too few have written, each his parts, is complete; and each part is there
        once, and all are of one moment."""
        for number, (seating, step) in self.keeping.items():
            parts = [part for m in self.members.values() for part in m.written.get(number, {}).items()]
            ranks = [rank for rank, _ in parts]
            assert len(set(ranks)) == len(ranks), f"two members have written the same part: {parts}"
            if len(ranks) == seating.layout.world and f"kept {number}" not in self.checkpoints:
                chains = {chain for _, chain in parts}
                assert len(chains) == 1, f"parts of several histories are one checkpoint: {chains}"
                (chain,) = chains
                assert len(chain) == step
                agreed = min(len(chain), len(self.committed))
                assert chain[:agreed] == self.committed[:agreed]
                self.checkpoints[f"kept {number}"] = chain
                self.kept += 1

    def _commit(self, member: Member, chain: Chain) -> None:
        """The all-reduce of a step has come through: the one before is committed."""
        if member.expelled:
            return  # nobody hears it
        agreed = min(len(chain), len(self.committed))
        assert chain[:agreed] == self.committed[:agreed], f"{member.number} commits {chain} besides {self.committed}"
        self.committed = max(chain, self.committed, key=len)

    def _save(self, member: Member) -> None:
        """A checkpoint is complete once every rank has come to its step."""
        assert member.current is not None
        if member.expelled:
            return
        current, chain = member.current, member.chain
        parts = current.net.joined.setdefault(("saved", chain), set())
        parts.add(member.number)
        if parts >= set(current.seating.members) and chain:
            agreed = min(len(chain), len(self.committed))
            assert chain[:agreed] == self.committed[:agreed]
            self.checkpoints[f"{current.generation}-{len(chain)}"] = chain

    def _present(self) -> list[Member]:
        return [self.members[m] for m in self.generations.present if m not in self._dead]

    def _check_move(self, move: Move) -> None:
        if move.source is None:
            return
        for member in self._present():
            if member.share is not None and member.share.whole:
                assert member.applied <= move.step, f"step {member.applied} of member {member.number} is lost: {move}"
        assert len(self.committed) <= move.step, f"{len(self.committed)} steps are committed: {move}"

    def _check_restore(self) -> None:
        """Nothing that was adopted can still be put together out of those who are left."""
        for generation, seating in self.generations.possible.items():
            present = {m.number: m for m in self._present()}
            held = {n: m for n, m in present.items() if m.adopted == generation and m.share and m.share.whole}
            beside = {n for n, m in present.items() if m.verified and m.verified.generation == generation}
            adopted = any(m.adopted == generation for m in present.values())
            step = max((m.applied for m in held.values()), default=0)
            able = {n for n, m in held.items() if step in (m.applied, m.pending)} | beside
            whole = all(
                first in able or (second is not None and seating.members[second] in able)
                for first, second in zip(seating.members, seating.seconds, strict=True)
            )
            assert not (adopted and whole), f"generation {generation} is whole among {sorted(able)}, and is given up"

    def _check_formed(self, number: int, step: int) -> None:
        seating = self.generations.possible[number]
        for m in seating.members:
            member = self.members[m]
            assert member.number in self._dead or member.adopted == number, f"{m} has adopted {member.adopted}"

    def _check_bounds(self) -> None:
        generations = self.generations
        assert len(generations.possible) <= 2, sorted(generations.possible)
        assert generations.reports.keys() <= generations.present.keys()

    def settle(self, steps: int = 3, limit: int = 8_000) -> None:
        """All messages arrive, nobody else is lost: the run forms, and makes steps."""
        for member in self.members.values():
            member.frozen = False
        while self.lost:
            self.lose(*self.lost)
        while len(self.generations.present) < self.least:
            self.join()
        goal: int | None = None
        chance = Random(0)
        begun = len(self.numbers)
        for _ in range(limit):
            actions = self.possible_actions()
            ranks = self.generations.seating.members if self.generations.seating else ()
            slowest = min((self.members[m].applied for m in ranks), default=0)
            if self.generations.is_settled:
                goal = slowest + steps if goal is None else goal
                if slowest >= goal:
                    break
            assert actions, "nothing can happen any more"
            chance.choice(actions)()
        else:
            raise AssertionError(f"no progress: {self.generations.coming} {self.generations.reports}")
        assert len(self.numbers) <= begun + 6, f"generations follow each other: {self.numbers[begun:]}"
        chains = {self.members[m].chain[:goal] for m in self.generations.seating.members}
        assert len(chains) == 1, chains
