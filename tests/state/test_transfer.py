"""Does a transfer put every wanted element where it belongs, in rounds of any size, and say so when it does not?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from concertina.errors import StateError
from concertina.layout import Box, Layout, Seating
from concertina.layout.pieces import holdings
from concertina.layout.reshard import Move, plan_moves
from concertina.parallel.groups import Group, GroupOptions, form_crowd
from concertina.state import transfer as module
from concertina.state.alike import spread_alike
from concertina.state.transfer import Holdings, transfer
from tests.distributed import on_ranks
from tests.train.worlds import tiny_job

pytestmark = pytest.mark.dist

MODEL = tiny_job().model
OLD = Seating(Layout(3, ep=3), (0, 1, 2), (1, 2, 0))
NEW = Seating(Layout(2, tp=2, ep=2), (3, 1), (1, 0), spares=(0, 2))
"""Member 3 joins, 1 stays, 0 and 2 only send; 2 is not there any more."""


def crowd(position: int, size: int, store: Any, name: str = "crowd") -> Group:
    if size == 1:
        return Group.alone("crowd")
    return form_crowd(position, size, dist.PrefixStore(name, store), GroupOptions(timeout=timedelta(seconds=20)))


def value(name: str, kind: int, box: Box, shape: Sequence[int]) -> torch.Tensor:
    """A number for every element of the model that no other has."""
    index = torch.zeros((), dtype=torch.float64)
    for length, start, stop in zip(shape, box.start, box.stop, strict=True):
        index = index.unsqueeze(-1) * length + torch.arange(start, stop, dtype=torch.float64)
    return index + (kind + 3 * sum(name.encode())) * 1e6 + 0.5


def filled(boxes: dict[str, list[Box]], blank: bool) -> Holdings:
    found: Holdings = {}
    for name, theirs in boxes.items():
        for box in theirs:
            views = [value(name, kind, box, SHAPES[name]) for kind in range(3)]
            if blank:
                views = [torch.full_like(view, float("nan")) for view in views]
            found.setdefault(name, []).append((box, (views[0], views[1], views[2])))
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    from concertina.layout import shards

    return {name: shard.global_shape for name, shard in shards(MODEL, Layout(1), 0).items()}


SHAPES = shapes()


class Changed:
    """A plan with other moves."""

    def __init__(self, moves: Sequence[Move]) -> None:
        self.moves = tuple(moves)


def moved(position: int, store: Any, change: str, round_bytes: int) -> dict[str, Any]:
    roster = NEW.roster
    member = roster[position]
    nodes = {other: str(other) for other in range(4)}
    held = filled(holdings(MODEL, OLD, member), blank=False) if member in (0, 1, 2) else {}
    wanted = filled(holdings(MODEL, NEW, member), blank=True)
    plan: Any = plan_moves(MODEL, OLD, NEW, (0, 1, 2), nodes, only=member)
    moves = list(plan.moves)
    group = crowd(position, len(roster), store)
    if change == "a move is forgotten everywhere":
        whole = plan_moves(MODEL, OLD, NEW, (0, 1, 2), nodes).moves
        dropped = next(move for move in whole if move.target == 3)
        plan = Changed([move for move in moves if move != dropped])
    elif change == "a sender forgets a move" and member == 0:
        plan = Changed([move for move in moves if move.source != 0 or move is not moves[0]])
    elif change == "a sender's order differs" and member == 0:
        plan = Changed(random.Random(1).sample(moves, len(moves)))
    elif change == "a bit flips on the way" and member == 3:
        _flip_a_bit()
    elif change == "a sender does not have it" and member == 0:
        held.pop(next(move.name for move in moves if move.source == 0))
    faults = ["said before"] if change == "a fault was found before" and member == 2 else []
    try:
        report = transfer(plan, member, roster, held, wanted, group, faults, round_bytes)
    except StateError as error:
        return {"error": str(error)}
    finally:
        module.all_to_all_v = _EXCHANGE
    wrong = [
        (name, box, kind)
        for name, boxes in wanted.items()
        for box, views in boxes
        for kind, view in enumerate(views)
        if not torch.equal(view, value(name, kind, box, SHAPES[name]))
    ]
    return {"wrong": wrong, "report": report, "elements": sum(b.size for bs in wanted.values() for b, _ in bs)}


_EXCHANGE = module.all_to_all_v


def _flip_a_bit() -> None:
    """What arrives differs from what was sent in the last bit of its middle element."""

    def altered(rows: torch.Tensor, send: list[int], receive: list[int], group: Group) -> Any:
        pending = _EXCHANGE(rows, send, receive, group)
        arrived = pending.finish()
        if rows.dtype == torch.float64 and len(arrived):
            arrived.view(torch.int64)[len(arrived) // 2] ^= 1

        class Done:
            def finish(self) -> torch.Tensor:
                return arrived

        return Done()

    module.all_to_all_v = altered  # type: ignore[assignment]


@pytest.mark.parametrize("round_bytes", [1 << 26, 40_000, 800])
def test_every_wanted_element_arrives(round_bytes: int) -> None:
    found = on_ranks(moved, 4, "", round_bytes)
    reports = [each["report"] for each in found]
    assert all(not each["wrong"] for each in found)
    sent, received = (sum(getattr(report, key) for report in reports) for key in ("bytes_sent", "bytes_received"))
    local = sum(report.bytes_local for report in reports)
    assert sent == received
    assert local + received == sum(each["elements"] for each in found) * 3 * 8
    assert reports[0].bytes_sent == reports[2].bytes_received == reports[3].bytes_received == 0, "joins; only send"
    assert reports[2].bytes_sent > 0
    assert len({report.rounds for report in reports}) == 1
    assert (reports[0].rounds == 1) == (round_bytes == 1 << 26)


def gathered(position: int, store: Any, round_bytes: int) -> tuple[int, int]:
    """The last of four members gets a row from each of the others; rounds, and the most bytes it got in one."""
    rows, seen = [Box((row, 0), (row + 1, 400)) for row in range(3)], [0]
    plan: Any = Changed([Move("w", box, source, 3) for source, box in enumerate(rows)])
    held: Holdings = {"w": [(rows[position], _views(1.0))]} if position < 3 else {}
    wanted: Holdings = {"w": [(box, _views(0.0)) for box in rows]} if position == 3 else {}
    exchange = module.all_to_all_v

    def counted(rows: torch.Tensor, send: list[int], receive: list[int], group: Group) -> Any:
        if rows.dtype == torch.float64:
            seen.append(8 * max(sum(send), sum(receive)))
        return exchange(rows, send, receive, group)

    module.all_to_all_v = counted  # type: ignore[assignment]
    try:
        report = transfer(plan, position, range(4), held, wanted, crowd(position, 4, store), round_bytes=round_bytes)
    finally:
        module.all_to_all_v = exchange
    assert all(bool((view == 1).all()) for _, views in wanted.get("w", ()) for view in views)
    return report.rounds, max(seen)


def _views(number: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    one, two, three = (torch.full((1, 400), number, dtype=torch.float64) for _ in range(3))
    return one, two, three


def test_a_round_is_bounded_however_many_send_at_a_time() -> None:
    rounds, most = zip(*on_ranks(gathered, 4, 3000), strict=True)
    assert max(most) <= 3000
    assert len(set(rounds)) == 1
    assert rounds[0] >= 3 * 3 * 400 * 8 / 3000


CHANGES = {
    "a move is forgotten everywhere": r"elements of \d+ of",
    "a sender forgets a move": r"plans to send \d+ elements to member \d, which plans for \d+",
    "a sender's order differs": "which plans for the same in another order",
    "a bit flips on the way": "have checksum",
    "a sender does not have it": "does not hold",
    "a fault was found before": "said before",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_wrong_is_raised_by_everybody(change: str) -> None:
    found = on_ranks(moved, 4, change, 40_000)
    errors = [each["error"] for each in found]
    assert all(error.startswith("state was not moved") for error in errors)
    with pytest.raises(AssertionError, match=CHANGES[change]):
        raise AssertionError("\n".join(errors))


# -- what all know alike -------------------------------------------------------------------------------------------


def alike(position: int, store: Any, holders: dict[int, int]) -> Any:
    group = crowd(position, 3, store)
    bias = torch.tensor([1.5, -0.0, 3e-300], dtype=torch.float64)
    own = ({"step": holders[position], "recent": [0.1, 1 / 3]}, {"bias": bias}) if position in holders else None
    try:
        heard = spread_alike(own, group, torch.device("cpu"))
    except StateError as error:
        return str(error)
    into = torch.zeros(3, dtype=torch.float64)
    heard.write("bias", into)
    return heard.facts, into.view(torch.int64).tolist() == bias.view(torch.int64).tolist(), heard.fault


def test_who_has_nothing_hears_it_from_who_has() -> None:
    for facts, same_bits, fault in on_ranks(alike, 3, {1: 7, 2: 7}):
        assert facts == {"step": 7, "recent": [0.1, 1 / 3]}
        assert same_bits
        assert fault is None


def test_holders_at_different_steps_are_found() -> None:
    faults = [fault for _, _, fault in on_ranks(alike, 3, {1: 7, 2: 8})]
    assert faults[:2] == [None, None]
    assert faults[2] == "position 2 stands at step 8, position 1 at step 7"


def test_nobody_has_anything() -> None:
    assert all("no member has state" in said for said in on_ranks(alike, 3, {}))
