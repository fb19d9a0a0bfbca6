"""Which process groups does a rank belong to, and who makes them? Here, once a generation, from a layout.

Groups are plain backend objects handed around in `Groups`; torch's global default group is never made, so a rank can
drop one generation's groups and form the next in the same process.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from concertina.layout import ENDS, GROUPS, STAGE, Layout
from concertina.parallel.fence import Wires
from concertina.parallel.forming import Call, Place
from concertina.parallel.gloo import form_gloo
from concertina.parallel.nccl import form_nccl
from concertina.parallel.trace import Tap

__all__ = [
    "CROWD",
    "GROUP_NAMES",
    "KV",
    "SECONDS",
    "Group",
    "GroupOptions",
    "Groups",
    "connect_store",
    "form_crowd",
    "form_groups",
    "make_store",
]

KV = "dp_cp_kv"
"""Ranks that hold the same key-value heads: dp_cp, and the lanes of tp that share a head where tp exceeds them."""

TP_CP = "tp_cp"
"""Ranks that have tokens of the same sequences."""

SECONDS = "seconds"
"""All ranks of the world, apart from it: what they send to their second owners waits for nothing else."""

CROWD = "crowd"
"""All members of a generation, spares too: state moves over it."""

GROUP_NAMES = (*GROUPS, STAGE, KV, ENDS, SECONDS)


@dataclass(frozen=True)
class GroupOptions:
    """How groups are formed: `hostname` is the address Ray knows this node by (gloo binds to it)."""

    generation: int = 0
    device: str = "cpu"
    hostname: str = "127.0.0.1"
    timeout: timedelta = timedelta(seconds=60)


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. `rank` is this rank's position among `ranks`; `backend` is None for a group of one.

    Who listens at `tap` learns of every communication (`parallel/trace.py`).
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    backend: Any = field(default=None, repr=False, compare=False)
    wires: Wires = field(default_factory=Wires, repr=False, compare=False)
    tap: Tap = field(default_factory=Tap, repr=False, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def fence(self) -> None:
        """End all communication of this group and of those formed by the same call (`Wires.fence`)."""
        self.wires.fence()

    @classmethod
    def alone(cls, name: str = "world", rank: int = 0) -> Group:
        """The group of one rank: every collective on it is the identity."""
        return cls(name, (rank,), 0)


@dataclass(frozen=True)
class Groups:
    """All groups of one rank in one generation, and the layout they are of."""

    generation: int
    layout: Layout
    world: Group
    by_name: dict[str, Group]

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has been blocked in communication so far, but for that with second owners."""
        return self.world.tap.waited_s + sum(g.tap.waited_s for name, g in self.by_name.items() if name != SECONDS)

    def fence(self) -> None:
        """End all communication of this generation: what waits raises, in any thread (`Wires.fence`).

        When every pending communication has been waited for, the groups can be dropped, and their threads and sockets
        go with the last reference.
        """
        self.world.fence()

    def __getitem__(self, name: str) -> Group:
        return self.by_name[name]

    @classmethod
    def alone(cls) -> Groups:
        """The groups of a world of one process, without a store."""
        return cls(0, Layout(1), Group.alone(), {name: Group.alone(name) for name in GROUP_NAMES})


def make_store(hostname: str, listen_fd: int, timeout: timedelta) -> dist.TCPStore:
    """Serve a store on a socket that already listens on `hostname` (a TCPStore left to itself listens everywhere).

    The coordinator calls this once a generation; the store takes over `listen_fd`.
    """
    import socket

    with socket.socket(fileno=listen_fd) as listener:
        port = listener.getsockname()[1]
        listener.detach()
    return dist.TCPStore(
        hostname,
        port,
        None,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
        use_libuv=True,
    )


def connect_store(hostname: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Join the store of a generation as a client. Raises torch's DistStoreError after `timeout`."""
    return dist.TCPStore(hostname, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


def form_groups(
    layout: Layout,
    rank: int,
    store: dist.Store,
    options: GroupOptions,
    lanes_of_kv_head: int = 1,
    wires: Wires | None = None,
) -> Groups:
    """Form every group of `rank`, eagerly. All ranks of the layout must call it with the same store.

    `lanes_of_kv_head`: how many lanes of tp share a key-value head (`layout.kv_copies`). After it returns nothing
    touches the store. Names of groups carry the generation, so that an older rank cannot join a newer group.
    `wires`: who holds them can fence what is being formed, from another thread; then this raises soon, mostly within
    130 ms.
    """
    world = tuple(range(layout.world))
    members = {"world": world, SECONDS: world}
    members |= {name: layout.group_of(name, rank) for name in (*GROUPS, STAGE)}
    members |= {KV: layout.neighbours_of(rank, lanes_of_kv_head), ENDS: layout.ends_of(rank)}
    # Where one of the axes is 1 the other's group has the same ranks: its sockets do for both, which take turns.
    same = "tp" if layout.cp == 1 else "cp" if layout.tp == 1 else None
    if same is not None:
        del members[TP_CP]
    formed = _form(members, rank, "groups", store, options, wires or Wires())
    if same is not None:
        formed[TP_CP] = replace(formed[same], name=TP_CP, tap=Tap())
    return Groups(options.generation, layout, formed.pop("world"), formed)


def form_crowd(position: int, size: int, store: dist.Store, options: GroupOptions, wires: Wires | None = None) -> Group:
    """Form the group of all members of a generation, ranks and spares, by their positions in `Seating.roster`.

    All of them must call it with the same store. `wires` as in `form_groups`: pass the same to fence both.
    """
    return _form({CROWD: tuple(range(size))}, position, CROWD, store, options, wires or Wires())[CROWD]


def _form(
    members: dict[str, tuple[int, ...]], rank: int, purpose: str, store: dist.Store, options: GroupOptions, wires: Wires
) -> dict[str, Group]:
    places = [Place(name, ranks, ranks.index(rank)) for name, ranks in members.items() if len(ranks) > 1]
    call = Call(rank, f"generation{options.generation}/{purpose}", store, options.hostname, options.timeout, wires)
    backends = (form_nccl if options.device == "cuda" else form_gloo)(places, call)
    formed = {place.name: backend for place, backend in zip(places, backends, strict=True)}
    return {name: Group(name, ranks, ranks.index(rank), formed.get(name), wires) for name, ranks in members.items()}
