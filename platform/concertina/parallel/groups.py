"""Which process groups does a rank belong to, and who makes them? Here, once a generation, from a layout.

Groups are plain backend objects handed around in `Groups`; torch's global default group is never made, so a rank can
drop one generation's groups and form the next in the same process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from concertina.layout import GROUPS, STAGE, Layout
from concertina.parallel.trace import Tap

__all__ = ["GROUP_NAMES", "KV", "Group", "GroupOptions", "Groups", "connect_store", "form_groups", "make_store"]

KV = "dp_cp_kv"
"""Ranks that hold the same key-value heads: dp_cp, and the lanes of tp that share a head where tp exceeds them."""

GROUP_NAMES = (*GROUPS, STAGE, KV)


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
    tap: Tap = field(default_factory=Tap, repr=False, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

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
    layout: Layout, rank: int, store: dist.Store, options: GroupOptions, lanes_of_kv_head: int = 1
) -> Groups:
    """Form every group of `rank`, eagerly. All ranks of the layout must call it with the same store.

    `lanes_of_kv_head`: how many lanes of tp share a key-value head (`layout.kv_copies`). After it returns nothing
    touches the store. Names of groups carry the generation, so that an older rank cannot join a newer group.
    """
    members = {name: layout.group_of(name, rank) for name in (*GROUPS, STAGE)}
    members[KV] = layout.neighbours_of(rank, lanes_of_kv_head)
    world = _form("world", tuple(range(layout.world)), rank, store, options)
    by_name = {name: _form(name, ranks, rank, store, options) for name, ranks in members.items()}
    return Groups(options.generation, layout, world, by_name)


def _form(name: str, ranks: tuple[int, ...], rank: int, store: dist.Store, options: GroupOptions) -> Group:
    position = ranks.index(rank)
    if len(ranks) == 1:
        return Group(name, ranks, position)
    prefixed = dist.PrefixStore(f"generation{options.generation}/{name}/{ranks[0]}", store)
    make = _make_nccl if options.device == "cuda" else _make_gloo
    return Group(name, ranks, position, make(prefixed, position, len(ranks), options))


def _make_gloo(store: dist.Store, rank: int, size: int, options: GroupOptions) -> Any:
    settings = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    settings._timeout = options.timeout
    settings._devices = [dist.ProcessGroupGloo.create_device(hostname=options.hostname, lazy_init=False)]
    return dist.ProcessGroupGloo(store, rank, size, settings)


def _make_nccl(store: dist.Store, rank: int, size: int, options: GroupOptions) -> Any:
    settings = dist.ProcessGroupNCCL.Options()
    settings._timeout = options.timeout
    backend = dist.ProcessGroupNCCL(store, rank, size, settings)
    backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return backend
