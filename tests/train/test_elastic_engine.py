"""Does a run that loses members, gets new ones and changes its layout compute what one process computes?

The engines stay in their processes, changing seats reads nothing from storage, and every sequence is read once.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import psutil
import pytest

from concertina.config import AnomalyConfig, Job
from concertina.layout import Layout
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from concertina.train.share import Share
from tests.distributed import on_ranks, run_distributed
from tests.train.generations import Gone, Life, Stage, described, live, on_nodes
from tests.train.ledger import check_ledger
from tests.train.worlds import engine_on, tiny_job, unconfigured

pytestmark = pytest.mark.dist

JOB_CHANGES: dict[str, Any] = {"training__steps": 16, "model__router_bias_update_rate": 0.01}
JOB = tiny_job(**JOB_CHANGES)
LOSS_BOUND, STATE_BOUND = 1e-10, 1e-8

ALL = {0: "a", 1: "a", 2: "b", 3: "b"}


def without(*lost: int, joined: tuple[int, ...] = ()) -> dict[int, str]:
    return {member: node for member, node in ALL.items() if member not in lost} | dict.fromkeys(joined, "c")


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return alone(JOB)


def alone(job: Job) -> dict[str, Any]:
    """One process, uninterrupted."""
    engine = engine_on(job, Layout(1), 0, None)
    losses = {step: engine.train_step(step).loss for step in range(1, job.training.steps + 1)}
    return {
        "losses": losses,
        "tokens": engine.tokens,
        "watch": engine.watch.state(),
        "state": {key: boxed.piece.numpy().copy() for key, boxed in engine.state().items()},
    }


def deviation(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> tuple[float, float]:
    """The largest relative one of any loss, and the largest of any element of state, on any member."""
    states = [
        np.abs(piece - reference["state"][key][box.slices()]).max()
        for found in ranks
        for key, (box, piece) in found.get("state", {}).items()
    ]
    return loss_deviation(ranks, reference), float(max(states))


def loss_deviation(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> float:
    """The largest relative one of any step's loss on any member."""
    return max(
        abs(loss - reference["losses"][step]) / reference["losses"][step]
        for found in ranks
        for step, loss in found["losses"].items()
    )


def check(results: list[dict[str, Any]], stages: list[Stage], reference: dict[str, Any]) -> None:
    """Every loss, and the state at the end: first owners', second owners' and what all hold alike."""
    ranks = [results[member] for member in stages[-1].seating.members]
    loss, state = deviation(ranks, reference)
    assert loss < LOSS_BOUND
    assert state < STATE_BOUND
    check_whole(results, stages, reference)


def check_whole(results: list[dict[str, Any]], stages: list[Stage], reference: dict[str, Any]) -> None:
    """Every step was done and every sequence read, once; all state is there, and its copies."""
    ranks, steps = [results[member] for member in stages[-1].seating.members], stages[-1].until
    seen: dict[str, int] = {}
    for found in ranks:
        assert found["applied"] == found["updates"] == steps
        assert found["tokens"] == reference["tokens"]
        assert found["watch"]["seen"] == 0
        assert all(updates == steps for updates in found["copy_updates"])
        for key, (_, piece) in found["state"].items():
            seen[key] = seen.get(key, 0) + piece.size
        for key, bias in found["biases"].items():
            np.testing.assert_array_equal(bias, reference["state"][key])
    assert seen == {key: whole.size for key, whole in reference["state"].items()}
    check_copies(ranks)
    check_ledger(results, JOB, steps)


def check_copies(ranks: list[dict[str, Any]]) -> None:
    """Second copies are first ones to the bit, and each has one."""
    firsts = {
        (key, box): piece
        for found in ranks
        for key, (box, piece) in found["state"].items()
        if not key.startswith("buffer/")
    }
    copies = [each for found in ranks for each in found["copies"]]
    for key, box, piece in copies:
        np.testing.assert_array_equal(piece, firsts[key, box])
    assert len(copies) == (len(firsts) if len(ranks) > 1 else 0)


def run(stages: list[Stage], job: Job = JOB, tamper: Any = None, timeout_s: float = 90.0) -> list[dict[str, Any]]:
    members = 1 + max(member for stage in stages for member in stage.seating.roster)
    return on_ranks(live, members, job, stages, tamper, timeout_s=timeout_s)


# -- a member is lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", ["computing", "summed", "some"])
def test_any_member_is_lost_at_any_moment(lost: int, fault: str, reference: dict[str, Any]) -> None:
    behind = tuple(member for member in ALL if member != lost)[: 1 + lost % 2] if fault == "some" else ()
    stages = [
        Stage(on_nodes(Layout(4, ep=2), ALL), 6, (lost,), fault, behind),
        Stage(on_nodes(Layout(3, ep=3), without(lost)), 16),
    ]
    results = run(stages)
    check(results, stages, reference)
    assert [results[member]["completed"] for member in behind] == [[7] for _ in behind]
    if fault != "some":
        assert all(not found["completed"] for found in results)


@pytest.mark.parametrize("lost", [(0, 1), (2, 3)])
@pytest.mark.parametrize("fault", ["computing", "some"])
def test_a_node_is_lost(lost: tuple[int, int], fault: str, reference: dict[str, Any]) -> None:
    behind = tuple(member for member in ALL if member not in lost)[:1] if fault == "some" else ()
    stages = [
        Stage(on_nodes(Layout(4, tp=2, ep=4), ALL), 5, lost, fault, behind),
        Stage(on_nodes(Layout(2, ep=2), without(*lost)), 16),
    ]
    check(run(stages), stages, reference)


def test_the_last_one_goes_on_alone(reference: dict[str, Any]) -> None:
    stages = [
        Stage(on_nodes(Layout(2, ep=2), {0: "a", 1: "b"}), 5, (0,), "summed"),
        Stage(on_nodes(Layout(1), {1: "b"}), 9),
        Stage(on_nodes(Layout(2), {1: "b", 2: "a"}), 16),
    ]
    check(run(stages), stages, reference)


def skip_step_7(life: Life, number: int) -> None:
    if number == 0:
        life.engine.watch.skipped.add(7)


def test_who_completes_a_step_judges_it_alike() -> None:
    """Step 7 is an anomaly that is skipped; one member is told its totals, and one that joins the marks."""
    alone = run([Stage(on_nodes(Layout(1), {0: "a"}), 16)], tamper=skip_step_7)[0]
    stages = [
        Stage(on_nodes(Layout(4, ep=2), ALL), 6, (3,), "some", (1,)),
        Stage(on_nodes(Layout(4, ep=4), without(3, joined=(4,))), 16),
    ]
    results = run(stages, tamper=skip_step_7)
    assert results[1]["completed"] == [7]
    for member in stages[-1].seating.members:
        found = results[member]
        assert (found["applied"], found["updates"], found["copy_updates"]) == (
            16,
            15,
            [15] * len(found["copy_updates"]),
        )
        assert found["watch"]["skipped"] == [7]
    loss, state = deviation(results[:3], alone | {"state": {key: piece for key, (_, piece) in alone["state"].items()}})
    assert loss < LOSS_BOUND
    assert state < STATE_BOUND


def no_number_at_7(life: Life, number: int) -> None:
    """In the first stage the loss of step 7 is not a number."""
    forward = life.engine._forward_backward

    def poisoned(step: int) -> Any:
        sums = forward(step)
        if step == 7:
            sums[0] = float("nan")
        return sums

    if number == 0:
        life.engine._forward_backward = poisoned  # type: ignore[method-assign]
    else:
        life.engine.__dict__.pop("_forward_backward", None)


@pytest.mark.parametrize("action", ["roll_back", "stop"])
def test_a_step_that_only_some_could_judge_is_void_for_all(action: str, reference: dict[str, Any]) -> None:
    """Its totals say that it is not to be applied, and reach only who did not lose the member that died: 2, not 1."""
    job = JOB.model_copy(
        update={"training": JOB.training.model_copy(update={"anomaly": AnomalyConfig(nonfinite=action)})}
    )
    stages = [
        Stage(on_nodes(Layout(4, ep=2), ALL), 6, (3,), "some", (1,)),
        Stage(on_nodes(Layout(3, ep=3), without(3)), 16),
    ]
    results = run(stages, job, no_number_at_7)
    check(results, stages, reference)
    assert all(found["completed"] == [] for found in results)


def checkpoint_third_step(life: Life, folder: Path) -> None:
    """Train to it on all ranks, and complete its checkpoint."""
    engine = life.engine
    life.train(3)
    engine.settle()
    write_part(partial_folder(folder, 3, 0), engine.state(), rank=engine.rank, world=engine.layout.world, generation=0)
    assert engine.confirm()
    if engine.rank == 0:
        assert commit(folder, 3, 0, engine.facts()) is not None
    assert engine.confirm()


def rolled_back(rank: int, store: Any, job: Job, folder: Path) -> dict[str, Any]:
    """Five steps, back to the checkpoint of the third; member 2 is lost when only some have come to the end of that."""
    life, lost = Life(rank, store, job, unconfigured(job)), (2,)
    engine, seats = life.engine, dict(list(ALL.items())[:3])
    stages = [
        Stage(on_nodes(Layout(3, ep=3), seats), 3, lost),
        Stage(on_nodes(Layout(2, ep=2), {0: "a", 1: "b"}), 8),
    ]
    life.enter(0, stages)
    checkpoint_third_step(life, folder)
    life.train(5)
    assert engine.confirm()
    if rank == 1:

        def publish() -> None:
            raise Gone

        engine.optimizer.publish = publish  # type: ignore[method-assign]
    with suppress(Gone):
        engine.load(checkpoint_folder(folder, 3), bad_step=6)
    engine.groups.fence()
    engine.share.abandon()
    if rank in lost:
        return described(life)
    life.enter(1, stages)
    life.train(8)
    engine.settle()
    return described(life)


def test_members_that_went_back_only_half_way_go_on_alike(tmp_path: Path) -> None:
    results = on_ranks(rolled_back, 3, JOB, tmp_path)[:2]
    assert [(found["applied"], found["updates"]) for found in results] == [(8, 7)] * 2
    assert [(found["watch"]["skipped"], found["watch"]["seen"]) for found in results] == [([6], 1)] * 2
    assert results[0]["watch"] == results[1]["watch"]
    check_copies(results)


def loaded(rank: int, store: Any, job: Job, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, two steps, back to the checkpoint, and on to the fifth."""
    life = Life(rank, store, job, unconfigured(job))
    engine = life.engine
    life.enter(0, [Stage(on_nodes(Layout(3, ep=3), without(3)), 5)])
    checkpoint_third_step(life, folder)
    life.train(5)
    before = dict(life.losses)
    assert engine.confirm()
    engine.load(checkpoint_folder(folder, 3))
    life.train(5)
    assert life.losses == before
    engine.settle()
    return described(life)


def test_copies_follow_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    check_copies(on_ranks(loaded, 3, JOB, tmp_path))


# -- growing, spares, other layouts --------------------------------------------------------------------------------


def test_a_member_joins(reference: dict[str, Any]) -> None:
    stages = [
        Stage(on_nodes(Layout(3, ep=3), without(3)), 6),
        Stage(on_nodes(Layout(4, ep=2), ALL), 16),
    ]
    results = run(stages)
    check(results, stages, reference)
    assert results[3]["reports"][0]["bytes_sent"] == 0
    assert results[3]["reports"][0]["bytes_received"] > 0


def test_a_member_becomes_a_spare_and_comes_back(reference: dict[str, Any]) -> None:
    stages = [
        Stage(on_nodes(Layout(4, ep=4), ALL), 4),
        Stage(on_nodes(Layout(3), without(3), spares=(3,)), 8, (1,), "some", (2,)),
        Stage(on_nodes(Layout(3, ep=3), without(1)), 16),
    ]
    results = run(stages)
    check(results, stages, reference)
    assert results[3]["reports"][0]["bytes_received"] == 0


PAIRS = [
    (Layout(4, tp=2, ep=2), Layout(4, ep=4)),
    (Layout(4, ep=2, etp=2), Layout(4, tp=4)),
    (Layout(4, tp=4, ep=4), Layout(3, ep=3)),
    (Layout(3), Layout(4, tp=2, ep=2, etp=2)),
    (Layout(4, pp=2, ep=2), Layout(4, cp=2, tp=2)),
    (Layout(4, pp=2, cp=2), Layout(3, pp=3)),
    (Layout(2, pp=2, stage_layers=(1, 2)), Layout(4, pp=2, tp=2)),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_there_and_back_is_the_same_to_the_bit(first: Layout, second: Layout) -> None:
    """State goes to another layout and back, with no step between."""
    seat = {layout: on_nodes(layout, dict(list(ALL.items())[: layout.world])) for layout in (first, second)}
    there = run([Stage(seat[first], 4)])
    back = run([Stage(seat[first], 4), Stage(seat[second], 4), Stage(seat[first], 4)])
    for member in range(first.world):
        assert back[member]["state"].keys() == there[member]["state"].keys()
        for key, (box, piece) in there[member]["state"].items():
            assert back[member]["state"][key][0] == box
            np.testing.assert_array_equal(back[member]["state"][key][1], piece, err_msg=key)


def test_a_new_generation_of_the_same_layout_changes_no_bit() -> None:
    seat = on_nodes(Layout(4, tp=2, ep=4), ALL)
    at_once = run([Stage(seat, 16)])
    moved = run([Stage(seat, 5), Stage(seat, 11, (), "summed"), Stage(seat, 16)])
    for one, other in zip(at_once, moved, strict=True):
        assert one["losses"] == other["losses"]
        for key, (_, piece) in one["state"].items():
            np.testing.assert_array_equal(other["state"][key][1], piece, err_msg=key)


FIVE = [
    Stage(on_nodes(Layout(4, ep=2), ALL), 3, (3,), "some", (1,)),
    Stage(on_nodes(Layout(3, ep=3), without(3)), 6),
    Stage(on_nodes(Layout(4, tp=2, ep=2), without(3, joined=(4,))), 8, (0,), "computing"),
    Stage(on_nodes(Layout(3), without(0, 3, joined=(4,))), 11, (4,), "summed"),
    Stage(on_nodes(Layout(2, tp=2, etp=2), without(0, 3)), 13),
    Stage(on_nodes(Layout(3, ep=3), without(0, 3, joined=(5,))), 16),
]


EVERY_AXIS = [
    Stage(on_nodes(Layout(4, pp=2, ep=2), ALL), 3, (3,), "some", (1,)),
    Stage(on_nodes(Layout(3, pp=3), without(3)), 5, (0,), "summed"),
    Stage(on_nodes(Layout(2, cp=2, ep=2), without(0, 3)), 8),
    Stage(on_nodes(Layout(4, pp=2, cp=2), {1: "a", 2: "b", 4: "c", 5: "c"}), 11, (4, 5), "computing"),
    Stage(on_nodes(Layout(2, pp=2, stage_layers=(1, 2)), without(0, 3)), 13),
    Stage(on_nodes(Layout(3, cp=3), without(0, 3, joined=(6,))), 16),
]


def test_with_stages_and_chunks(reference: dict[str, Any]) -> None:
    results = run(EVERY_AXIS, tiny_job(**JOB_CHANGES, training__micro_batch_size=2))
    check(results, EVERY_AXIS, reference)
    assert results[1]["completed"] == [4]


def test_five_reconfigurations(reference: dict[str, Any]) -> None:
    results = run(FIVE)
    check(results, FIVE, reference)
    assert results[1]["completed"] == [4]


# -- what is left ------------------------------------------------------------------------------------------------------


def dropped(rank: int, store: Any, job: Job) -> list[tuple[bool, int]]:
    """Of every generation: whether anything of the share before is left once it is not current, and the threads."""
    seen = []
    life = Life(rank, store, job, unconfigured(job))
    stages = [Stage(on_nodes(Layout(2, tp=2, ep=2), {0: "a", 1: "b"}), number) for number in range(1, 6)]
    gc.disable()
    for number, stage in enumerate(stages):
        left = [] if life.engine._share is None else _parts(life.engine.share)
        life.enter(number, stages)
        life.train(stage.until)
        life.engine.settle()
        if number == 1:
            gc.collect()  # what libraries import at their first use keeps a traceback with our frames
        seen.append((any(what() is not None for what in left), psutil.Process().num_threads()))
    gc.enable()
    return seen


def _parts(share: Share) -> list[Any]:
    return [ref(part) for part in (share, share.optimizer, share.decoder, share.groups, *share.seconds.copies.values())]


def test_a_share_that_is_not_current_is_gone_with_its_groups_and_their_threads() -> None:
    for seen in run_distributed(dropped, 2, JOB):
        assert not any(left for left, _ in seen)
        assert seen[-1][1] <= seen[0][1], "threads add up"


# -- mutations: each breaks something, and the comparison must see it -----------------------------------------------


def stale_moment(life: Life, number: int) -> None:
    if number == 1:
        life.engine.optimizer.views()["embedding.weight"][1][1].mul_(0.9)


def missing_second_update(life: Life, number: int) -> None:
    """The copies leave out step 5."""
    if number == 0:
        seconds = life.engine.share.seconds
        apply = seconds.apply
        seconds.apply = lambda *how: apply(*how) if life.engine.optimizer.updates != 5 else None  # type: ignore[method-assign]


def wrong_divisor(life: Life, number: int) -> None:
    """The tokens of the old world."""
    if number == 1:
        agree = life.engine._agree

        def agreed(vector: Any) -> list[float]:
            totals = agree(vector)
            totals[4] *= 3 / 4
            return totals

        life.engine._agree = agreed  # type: ignore[method-assign]


def skipped_sequence(life: Life, number: int) -> None:
    if number == 1:
        batch = life.engine.sampler.batch
        life.engine.sampler.batch = lambda step: [*batch(step)[1:], batch(step)[1]]  # type: ignore[method-assign]


LOSS_OF_ONE = [
    Stage(on_nodes(Layout(4, ep=2), ALL), 6, (3,), "computing"),
    Stage(on_nodes(Layout(3, ep=3), without(3)), 16),
]


@pytest.mark.parametrize("tamper", [stale_moment, missing_second_update, wrong_divisor, skipped_sequence])
def test_a_mutation_is_seen(tamper: Any, reference: dict[str, Any]) -> None:
    results = run(LOSS_OF_ONE, tamper=tamper)
    loss, state = deviation(results[:3], reference)
    assert loss > 100 * LOSS_BOUND
    assert state > 100 * STATE_BOUND


def test_a_run_that_has_nothing_left_begins_anew(reference: dict[str, Any]) -> None:
    engine = engine_on(JOB, Layout(1), 0, None)
    for step in (1, 2, 3):
        engine.train_step(step)
    engine.settle()
    engine.adopt(engine.prepare(engine.share.seating, 0, engine.groups, "initial"))
    engine.start_anew()
    assert (engine.applied, engine.tokens, engine.last_totals) == (0, 0, None)
    for step in (1, 2, 3):
        assert engine.train_step(step).loss == reference["losses"][step]
    assert engine.facts()["updates"] == 3
