"""Nobody has the state any more: is a checkpoint that is damaged passed over, and the newest sound one gone back to?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from concertina.elastic.messages import Move
from concertina.errors import CheckpointError
from concertina.state import sound
from concertina.state.manifest import checkpoint_folder, list_checkpoints
from concertina.track.events import EventType
from tests.actors.test_regrouping import Scene
from tests.state.test_manifest import complete, names
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """It trains, has come to step 9, and has checkpoints of steps 4 and 8."""
    made = Scene(tmp_path)
    made.trains()
    complete(made.plan.checkpoints, 4, 8)
    made.book._written |= {EventType.CHECKPOINT: 8, EventType.STEP: 9}
    made.book.step = 9
    yield made
    made.log.close()


def spoil(scene: Scene, step: int, how: str = "flip") -> None:
    victim = checkpoint_folder(scene.plan.checkpoints, step) / "shard-1"
    content = bytearray(victim.read_bytes())
    match how:
        case "flip":
            content[3] ^= 1
            victim.write_bytes(content)
        case "truncate":
            victim.write_bytes(content[:-1])
        case "remove":
            victim.unlink()


def lose_everything(scene: Scene) -> None:
    """Two of three, and others come: what the one has is not all."""
    scene.lose(1, 2)
    scene.arrive(3, 4)
    scene.halted(0, scene.regrouping.generations.last_number, 0, 9)


def moved_to(scene: Scene) -> Any:
    return scene.channel.take(Move)[0]


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_one_is_passed_over_and_removed(scene: Scene, how: str) -> None:
    spoil(scene, 8, how)
    lose_everything(scene)
    move = moved_to(scene)
    assert (move.step, move.checkpoint) == (4, str(checkpoint_folder(scene.plan.checkpoints, 4)))
    assert move.saved == 4, "the next one is written again"
    assert names(list_checkpoints(scene.plan.checkpoints)) == ["step-00000004"]
    (removed,) = scene.events(EventType.CHECKPOINT_REMOVED)
    assert "shard-1" in removed.data["damage"]
    (back,) = scene.events(EventType.ROLLBACK)
    assert back.data["to_step"] == 4


def test_a_sound_one_is_gone_back_to(scene: Scene) -> None:
    lose_everything(scene)
    assert moved_to(scene).step == 8
    assert names(list_checkpoints(scene.plan.checkpoints)) == ["step-00000004", "step-00000008"]


def test_where_none_is_sound_nothing_is_removed_and_the_run_ends(scene: Scene) -> None:
    for step in (4, 8):
        spoil(scene, step)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        lose_everything(scene)
    assert len(list_checkpoints(scene.plan.checkpoints)) == 2, "a person shall see them"


def test_a_folder_that_cannot_be_read_is_not_one_without_checkpoints(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin again from nothing would lose them."""

    def refuse(root: Path) -> list[Path]:
        raise PermissionError("not allowed")

    monkeypatch.setattr("actors.restoring.list_checkpoints", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: not allowed"):
        lose_everything(scene)


def test_reading_a_large_one_holds_nobody_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slowly(folder: Path, *shares: int) -> None:
        assert gate.wait(30)

    monkeypatch.setattr(sound, "verify", slowly)
    monkeypatch.setattr("actors.restoring._AT_ONCE_S", 0.01)
    lose_everything(scene)
    scene.regrouping.look()
    assert scene.channel.take(Move) == {}
    gate.set()
    wait_until(lambda: scene.regrouping._restoring.is_over, 10)
    scene.regrouping.look()
    assert moved_to(scene).step == 8


def test_an_answer_to_a_question_that_was_overtaken_counts_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked is lost while a checkpoint is read: the generation after it asks again."""
    gates = [threading.Event(), threading.Event()]
    asked = iter(gates)
    monkeypatch.setattr(sound, "verify", lambda folder, *shares: next(asked).wait(30))
    monkeypatch.setattr("actors.restoring._AT_ONCE_S", 0.01)
    lose_everything(scene)
    scene.lose(0)
    gates[0].set()
    scene.regrouping.look()
    assert scene.channel.take(Move) == {}, "nobody has read for the second one yet"
    gates[1].set()
    wait_until(lambda: scene.regrouping._restoring.is_over, 10)
    scene.regrouping.look()
    (move,) = {order.generation: order for order in scene.channel.take(Move).values()}.values()
    assert (move.generation, move.step) == (scene.regrouping.generations.last_number, 8)
