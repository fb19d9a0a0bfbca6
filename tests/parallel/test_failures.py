"""Is a broken connection told apart from a rank's own mistake? Asked of what torch and gloo really raise."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from concertina.errors import CheckpointError
from concertina.layout import Layout
from concertina.parallel.collectives import all_gather_into, all_reduce_sum, all_to_all_v, reduce_scatter_sum
from concertina.parallel.failures import in_one_line, is_communication_failure
from concertina.parallel.groups import GroupOptions, connect_store, form_groups
from tests.distributed import form, listening_store, run_distributed

WORLD = 3
SIZE = 4096  # more than a socket takes at once would be, were it waited for


def broken(call: Any) -> tuple[bool, str]:
    """Whether what `call` raises is blamed on the network, and what it was."""
    try:
        call()
    except (RuntimeError, OSError, ValueError) as error:
        return is_communication_failure(error), f"{type(error).__name__}: {error}"
    return False, "nothing was raised"


def after_a_peer_died(rank: int, store: Any) -> dict[str, tuple[bool, str]]:
    """The last rank ends as soon as the groups stand; each group of the others breaks in another call."""
    groups = form(Layout(WORLD), rank, store, timeout_s=20)
    store.set(f"formed{rank}", "")
    store.wait([f"formed{each}" for each in range(WORLD)])  # before that its end would break their forming
    if rank == WORLD - 1:
        return {}
    x, each = torch.ones(SIZE * WORLD), [SIZE] * WORLD
    return {
        "all-reduce": broken(lambda: all_reduce_sum(x.clone(), groups.world).finish()),
        "gather": broken(lambda: all_gather_into(x.clone(), x[:SIZE].clone(), groups["dp"]).finish()),
        "reduce-scatter": broken(lambda: reduce_scatter_sum(x[:SIZE].clone(), x, groups["dp_cp"]).finish()),
        "all-to-all": broken(lambda: all_to_all_v(x, each, each, groups["edp"]).finish()),
        "the same group again": broken(lambda: all_reduce_sum(x.clone(), groups.world).finish()),
    }


@pytest.mark.dist
def test_a_peers_death_breaks_every_collective_and_is_its_fault() -> None:
    for found in run_distributed(after_a_peer_died, WORLD)[:-1]:
        assert {name: blamed for name, (blamed, _) in found.items()} == dict.fromkeys(found, True), found


def beside_a_hung_peer(rank: int, store: Any) -> tuple[bool, str] | None:
    """The last rank takes no part until the others have given up."""
    groups = form_groups(Layout(2), rank, store, GroupOptions(timeout=timedelta(seconds=0.5)))
    if rank == 1:
        store.wait(["given up"])
        return None
    try:
        return broken(lambda: all_reduce_sum(torch.ones(SIZE), groups.world).finish())
    finally:
        store.set("given up", "")


@pytest.mark.dist
def test_a_hung_peer_is_an_error_after_the_groups_timeout() -> None:
    found = run_distributed(beside_a_hung_peer, 2)[0]
    assert found[0], found
    assert "imed out" in found[1]


@pytest.mark.unit
def test_a_store_that_does_not_answer() -> None:
    store = listening_store()
    port, short = store.port, timedelta(seconds=0.1)
    blamed, text = broken(lambda: connect_store("127.0.0.1", port, short).get("nobody sets this"))
    assert blamed, text
    del store
    blamed, text = broken(lambda: connect_store("127.0.0.1", port, short))
    assert blamed, text


@pytest.mark.unit
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4242"),
        RuntimeError("Connection reset by peer"),
        RuntimeError("writev [127.0.0.1]:47: Broken pipe"),
        dist.DistBackendError("NCCL error"),
        dist.DistNetworkError("connect() timed out"),
    ],
    ids=str,
)
def test_of_the_network(error: BaseException) -> None:
    assert is_communication_failure(error)


@pytest.mark.unit
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("/home/igloo/corpus is no tensor"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        ValueError("Connection closed by peer"),
        CheckpointError("gloo/step-00000010: missing"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_of_the_ranks_own_work(error: BaseException) -> None:
    assert not is_communication_failure(error)


@pytest.mark.unit
def test_a_wrong_call_is_the_ranks_own_work() -> None:
    blamed, text = broken(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert not blamed, text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError(
                "[/w/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37566. "
                "This is typically caused by a remote worker crashing. GLHF!"
            ),
            "Connection closed by peer [127.0.0.1]:37566",
        ),
        (
            RuntimeError("[a list] is what I was given. It is wrong.\nmore"),
            "[a list] is what I was given. It is wrong.",
        ),
        (ValueError(), "ValueError"),
    ],
)
def test_a_person_reads_one_line(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
