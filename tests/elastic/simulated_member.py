"""A member as `actors/trainer.py` has it, without engine and threads: what does it do between any two others' actions?

The training thread is a coroutine that yields wherever another thread or member may come in between. State is known by
its *chain*: the generation in which each of its steps was summed. Two states are the same when their chains are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from concertina.elastic.messages import Control, Formed, Halt, Halted, Keep, Message, Move, Prepare, Prepared
from concertina.layout import Seating

__all__ = ["Broken", "Chain", "Member", "Net", "NotPrepared", "Overtaken", "Preparation", "Wait"]

Chain = tuple[int, ...]


class Broken(Exception):
    """A collective has failed."""


class Overtaken(Exception):
    """A newer generation has begun."""


class NotPrepared(Exception):
    """Groups were not formed."""


class Net:
    """What connects those who met at one store: who has joined which collective, whose wires are cut."""

    def __init__(self, seating: Seating) -> None:
        self.seating = seating
        self.joined: dict[tuple[object, ...], set[int]] = {}
        self.payloads: dict[int, Share | None] = {}
        self.totals: dict[int, list[float]] = {}
        self.words: dict[int, bool] = {}
        self.cut: set[int] = set()


@dataclass
class Share:
    """What a rank holds in a generation: chains by rank, its own and those it is second owner of. `whole`: all of them
    are filled."""

    seating: Seating
    rank: int
    shards: dict[int, Chain] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.rank, *self.seating.firsts(self.rank))

    @property
    def whole(self) -> bool:
        return set(self.ranks) <= self.shards.keys()


@dataclass
class Preparation:
    """Of one member for one generation."""

    generation: int
    seating: Seating
    net: Net
    share: Share | None
    done: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Wait:
    """Until all of `peers` have joined `op`; with no net until the member's own threads let it go on."""

    net: Net | None = None
    op: tuple[object, ...] = ()
    peers: frozenset[int] = frozenset()
    ready: Callable[[], bool] = lambda: True


Thread = Iterator[Wait]


class Member:
    """One process. `say` is its channel to the coordinator; `nets` are found by the port of a store, checkpoints by
    name."""

    def __init__(
        self, number: int, say: Callable[[Message], None], nets: dict[int, Net], checkpoints: dict[str, Chain]
    ) -> None:
        self.number, self.say, self.nets, self.checkpoints = number, say, nets, checkpoints
        self.halted_by = self.at_work_in = self.adopted = -1
        self.adopted_at = 0
        self.overtaken = self.regroup = self.frozen = self.expelled = False
        self.preparing: list[Preparation] = []  # a thread each
        self.coming: Preparation | None = None
        self.verified: Preparation | None = None
        self.current: Preparation | None = None
        self.orders: deque[Halt | Keep | Move] = deque()
        self.pending: int | None = None
        self.last_totals: tuple[int, list[float]] | None = None
        self.applications: list[tuple[int, int]] = []  # (generation of the sum, step), for the observer
        self.written: dict[int, dict[int, Chain]] = {}  # parts of checkpoints, by number and rank
        self.thread = self._obey()
        self.waits = next(self.thread)

    # -- what the observer sees ---------------------------------------------------------------------------------------

    @property
    def share(self) -> Share | None:
        return self.current.share if self.current is not None else None

    @property
    def chain(self) -> Chain:
        share = self.share
        return share.shards.get(share.rank, ()) if share is not None else ()

    @property
    def applied(self) -> int:
        return len(self.chain)

    # -- the supervisor's thread, and the one that prepares -----------------------------------------------------------

    def hear(self, order: Message) -> None:
        match order:
            case Control():
                self.regroup = order.regroup
            case Halt():
                self.halted_by = order.generation
                self.overtaken = True
                self._fence(order.generation)
                self.orders.append(order)
            case Prepare():
                if self.coming is not None and self.coming is not self.current:
                    self.coming.net.cut.add(self.number)
                seating, net = Seating.from_json(order.seating), self.nets[order.store[1]]
                rank = seating.rank_of(self.number)
                share = None if rank is None else Share(seating, rank)
                self.coming = Preparation(order.generation, seating, net, share)
                self.preparing.append(self.coming)
                net.joined.setdefault(("prepare",), set()).add(self.number)
            case Keep() | Move():
                self.orders.append(order)

    def _fence(self, generation: int) -> None:
        for preparation in (self.coming, self.verified, self.current):
            if preparation is not None and preparation.generation < generation:
                preparation.net.cut.add(self.number)

    def prepared(self, coming: Preparation) -> None:
        """A thread that prepares has met all the others."""
        self.preparing.remove(coming)
        coming.done = True
        self.say(Prepared(self.number, coming.generation, 0.0))

    def not_prepared(self, coming: Preparation) -> None:
        self.preparing.remove(coming)
        coming.failed = True
        self.say(Prepared(self.number, coming.generation, 0.0, "a peer is gone"))

    # -- the training thread ------------------------------------------------------------------------------------------

    def _obey(self) -> Thread:
        while True:
            yield Wait(ready=lambda: bool(self.orders))
            order = self.orders.popleft()
            if isinstance(order, Halt):
                self._report("")
            elif order.generation < self.halted_by:
                continue
            elif isinstance(order, Keep):
                yield from self._keep(order)
            else:
                yield from self._work(order)

    def _work(self, move: Move) -> Thread:
        try:
            yield from self._take_seat(move)
            if self.current is not None:
                yield from self._train()
                self._report("")
        except (Broken, Overtaken, NotPrepared) as error:
            overtaken = self.halted_by > move.generation
            self._fence(move.generation + 1)
            self._report("" if overtaken else type(error).__name__, move.generation)
        finally:
            self.at_work_in = -1

    def _keep(self, keep: Keep) -> Thread:
        self._bring_up(keep)
        yield Wait()
        share = self.share
        if share is None:
            return
        keepers = share.seating.keepers(keep.present)
        for rank, chain in share.shards.items():
            if keepers[rank] == self.number:
                self.written.setdefault(keep.generation, {})[rank] = chain

    def _take_seat(self, move: Move) -> Thread:
        coming = self.coming
        assert coming is not None, "Prepare comes before Move"
        yield Wait()
        self._bring_up(move)
        yield Wait(ready=lambda: coming.done or coming.failed)
        if coming.failed or self.number in coming.net.cut:
            raise NotPrepared
        yield Wait()
        self.overtaken = False
        yield Wait()
        if coming.generation != move.generation or self.halted_by > move.generation:
            raise Overtaken
        yield Wait()
        if move.source is not None:
            yield from self._move(move, coming)
        else:
            yield from self._begin(move, coming)
        yield from self._adopt(move, coming)
        self.say(Formed(self.number, move.generation, move.step))
        self.at_work_in = move.generation

    def _bring_up(self, move: Move | Keep) -> None:
        verified, self.verified = self.verified, None
        if verified is not None and verified.generation == move.source:
            assert verified.share is not None
            self.current, self.adopted, self.pending = verified, verified.generation, None
        if self.current is None:
            return
        if self.current.generation != move.source or self.number not in move.present:
            self.current.net.cut.add(self.number)
            self.current, self.adopted = None, -1
        elif self.pending == move.step and move.totals is not None:
            self._complete(move.totals)
        self.pending = None

    def _move(self, move: Move, coming: Preparation) -> Thread:
        assert move.seating is not None
        net, old = coming.net, Seating.from_json(move.seating)
        net.payloads[self.number] = self.share
        yield from self._collective(net, ("transfer",), coming.seating.roster)
        if coming.share is not None:
            for rank in coming.share.ranks:
                coming.share.shards[rank] = self._transferred(move, old, net)
            yield Wait()
            self.verified = coming
        yield from self._collective(net, ("vote",), coming.seating.roster)

    def _transferred(self, move: Move, old: Seating, net: Net) -> Chain:
        """The state, put together from who has it: it must be one."""
        found = set()
        for rank, first in enumerate(old.members):
            second = old.seconds[rank]
            owners = [m for m in (first, None if second is None else old.members[second]) if m in move.present]
            assert owners, f"nobody has rank {rank} of generation {move.source}"
            for owner in owners:
                share = net.payloads[owner]
                assert share is not None, f"member {owner} is to give what it has not"
                assert share.seating == old, f"member {owner} has another generation's state"
                found.add(share.shards[rank])
        assert len(found) == 1, f"state of several histories is moved: {found}"
        chain = found.pop()
        assert len(chain) == move.step, f"step {move.step} is to be moved, found is {len(chain)}"
        return chain

    def _begin(self, move: Move, coming: Preparation) -> Thread:
        share = coming.share
        if share is None:
            return
        self.current, self.adopted, self.pending = coming, move.generation, None
        chain = self.checkpoints[move.checkpoint] if move.checkpoint is not None else ()
        share.shards = {share.rank: chain}
        yield from self._collective(coming.net, ("fill",), coming.seating.members)
        share.shards = dict.fromkeys(share.ranks, chain)

    def _adopt(self, move: Move, coming: Preparation) -> Thread:
        former, self.current = self.current, coming if coming.share is not None else None
        self.adopted, self.adopted_at, self.pending = move.generation, move.step, None
        if coming.share is not None and former is not coming:
            yield from self._collective(coming.net, ("publish", move.step), coming.seating.members)
        self.verified = None
        if former is not None and former is not coming:
            former.net.cut.add(self.number)
        self.regroup = False

    def _train(self) -> Thread:
        """Until the world regroups."""
        current, share = self.current, self.share
        assert current is not None
        assert share is not None
        net, ranks = current.net, current.seating.members
        while True:
            step = self.applied + 1
            yield Wait()
            if self.overtaken:
                raise Overtaken
            yield from self._collective(net, ("gradients", step), ranks)
            net.joined.setdefault(("sent", step), set()).add(self.number)
            firsts = [current.seating.members[first] for first in current.seating.firsts(share.rank)]
            yield from self._collective(net, ("sent", step), [self.number, *firsts])
            self.pending = step
            if share.rank == 0:
                net.words.setdefault(step, self.regroup)
            net.totals[step] = [float(current.generation), float(step)]
            yield from self._collective(net, ("agree", step), ranks)
            self._complete(net.totals[step])
            yield from self._collective(net, ("publish", step), ranks)
            if net.words[step]:
                return

    def _complete(self, totals: list[float]) -> None:
        share = self.share
        assert share is not None
        assert self.pending == self.applied + 1, f"{self.pending} is to be applied after {self.applied}"
        assert totals[1] == self.pending, "the totals are of another step"
        self.last_totals, self.pending = (self.pending, totals), None
        self.applications.append((int(totals[0]), int(totals[1])))
        share.shards = {rank: (*chain, int(totals[0])) for rank, chain in share.shards.items()}

    def _collective(self, net: Net, op: tuple[object, ...], group: tuple[int, ...] | list[int]) -> Thread:
        peers = frozenset(group)
        if self.number in net.cut and len(peers) > 1:
            raise Broken
        net.joined.setdefault(op, set()).add(self.number)
        if len(peers) > 1:
            yield Wait(net, op, peers)

    # -- it is over ---------------------------------------------------------------------------------------------------

    def _report(self, failure: str, failed: int = -1) -> None:
        share, current, verified = self.share, self.current, self.verified
        applied, totals = self.applied if current is not None else self.adopted_at, self.last_totals
        self.say(
            Halted(
                member=self.number,
                answers=self.halted_by,
                generation=self.adopted if share is None or share.whole else -1,
                verified=-1 if verified is None else verified.generation,
                step=applied,
                pending=self.pending if current is not None else None,
                totals=totals[1] if totals is not None and totals[0] == applied else None,
                records=[],
                evaluated=0,
                failure=failure,
                failed=failed if failure else -1,
            )
        )
