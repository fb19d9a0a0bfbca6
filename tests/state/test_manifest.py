"""Is a checkpoint complete or absent at every moment, whatever was killed when, and is only ours read?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.errors import CheckpointError
from concertina.layout import Box
from concertina.state.manifest import (
    MANIFEST,
    Part,
    checkpoint_folder,
    commit,
    discard_after,
    give_up_partial,
    list_checkpoints,
    partial_folder,
    prune,
    read_manifest,
    record_file,
    record_part,
    verify,
)

pytestmark = pytest.mark.unit

SHAPE = (4, 6)


def part_of(folder: Path, rank: int, world: int, box: Box) -> Part:
    record = record_file(folder / f"shard-{rank}")
    boxes = {"w": (box.start, box.stop)}
    return Part(
        rank=rank, world=world, generation=0, file=f"shard-{rank}", record=record, boxes=boxes, shapes={"w": SHAPE}
    )


def write(
    root: Path, step: int, boxes: list[Box], generation: int = 0, content: str = "bytes", world: int | None = None
) -> None:
    """A part for each box, as ranks write them; the files' content is of no matter here."""
    folder = partial_folder(root, step, generation)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, box in enumerate(boxes):
        (folder / f"shard-{rank}").write_text(f"{content} of rank {rank}")
        record_part(folder, part_of(folder, rank, world or len(boxes), box))


def write_loosely(root: Path, step: int, boxes: list[Box]) -> None:
    """The same without waiting for the disk, for tests that write hundreds."""
    folder = partial_folder(root, step, 0)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, box in enumerate(boxes):
        (folder / f"shard-{rank}").write_text("")
        page = part_of(folder, rank, len(boxes), box).model_dump_json()
        (folder / f"part-{rank:05d}.json").write_text(page)


def halves() -> list[Box]:
    return [Box.whole(SHAPE).cut(0, 2, index) for index in range(2)]


def complete(root: Path, *steps: int, **changes: Any) -> None:
    for step in steps:
        write(root, step, halves(), **changes)
        assert commit(root, step, changes.get("generation", 0), {"step": step}) is not None


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


# -- what is complete --------------------------------------------------------------------------------------------------


def test_a_manifest_says_everything(tmp_path: Path) -> None:
    complete(tmp_path, 12, generation=3)
    folder = checkpoint_folder(tmp_path, 12)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world, manifest.generation) == (12, 2, 3)
    assert (manifest.shapes, manifest.facts) == ({"w": SHAPE}, {"step": 12})
    assert manifest.files == {name: record_file(folder / name) for name in ("shard-0", "shard-1")}
    assert manifest.bytes == 2 * len("bytes of rank 0")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "shard-0", "shard-1"]


def test_names_sort_as_steps_do(tmp_path: Path) -> None:
    complete(tmp_path, 1000, 9, 200)
    assert names(list_checkpoints(tmp_path)) == ["step-00000009", "step-00000200", "step-00001000"]


def test_no_folder_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert commit(tmp_path / "none", 1, 0, {}) is None
    assert prune(tmp_path / "none", 2) == []
    assert discard_after(tmp_path / "none", 2) == []


cuts = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(0, 3)), max_size=3)


@st.composite
def tilings(draw: st.DrawFn) -> list[Box]:
    """The whole, cut again and again somewhere; empty pieces too."""
    boxes = [Box.whole(SHAPE)]
    for dim, parts, which in draw(cuts):
        box = boxes.pop(which % len(boxes))
        boxes += [box.cut(dim, parts, index) for index in range(parts)]
    return boxes


@settings(max_examples=40)
@given(boxes=tilings(), data=st.data())
def test_boxes_must_tile(boxes: list[Box], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    write_loosely(root, 1, boxes)
    assert commit(root, 1, 0, {}) is not None
    solid = [box for box in boxes if box.size]
    gone = data.draw(st.sampled_from(solid))
    instead = data.draw(st.sampled_from([None, *(box for box in solid if box != gone)]))
    wrong = [box if box is not gone else instead or Box((0, 0), (0, 0)) for box in boxes]
    write_loosely(root, 2, wrong)
    with pytest.raises(CheckpointError, match="w: the ranks wrote"):
        commit(root, 2, 0, {})


def test_as_many_elements_are_not_enough(tmp_path: Path) -> None:
    """Rows 0-2 and 1: four rows written, none twice at the same start, and row 3 nowhere."""
    write(tmp_path, 1, [Box((0, 0), (3, 6)), Box((1, 0), (2, 6))])
    with pytest.raises(
        CheckpointError, match="w: the ranks wrote 24 of 24 elements, in boxes that leave gaps or overlap"
    ):
        commit(tmp_path, 1, 0, {})
    assert list_checkpoints(tmp_path) == []


def test_pages_are_read_when_all_are_there(tmp_path: Path) -> None:
    """It is asked once a rank: to read all that lie there each time would take the square of their number."""
    write(tmp_path, 5, halves(), world=3)
    page = partial_folder(tmp_path, 5, 0) / "part-00001.json"
    page.write_text("this cannot be read")
    assert commit(tmp_path, 5, 0, {}) is None


def test_facts_of_another_step_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 10, halves())
    with pytest.raises(CheckpointError, match="facts of step 15 cannot stand beside the weights of step 10"):
        commit(tmp_path, 10, 0, {"step": 15})
    assert commit(tmp_path, 10, 0, {"step": 10}) is not None


# -- killed at any moment ----------------------------------------------------------------------------------------------


def test_a_kill_before_the_rename_leaves_parts_to_commit_again(tmp_path: Path) -> None:
    write(tmp_path, 5, halves())
    (partial_folder(tmp_path, 5, 0) / MANIFEST).write_text("half a manif")
    assert list_checkpoints(tmp_path) == []
    assert commit(tmp_path, 5, 0, {}) is not None
    verify(checkpoint_folder(tmp_path, 5))


def test_a_kill_after_the_rename_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    folder = checkpoint_folder(tmp_path, 5)
    (folder / "part-00000.json").write_text("{}")
    assert list_checkpoints(tmp_path) == [folder]
    verify(folder)


def test_half_removed_is_not_there(tmp_path: Path) -> None:
    complete(tmp_path, 5, 10)
    (checkpoint_folder(tmp_path, 5) / MANIFEST).unlink()
    assert names(list_checkpoints(tmp_path)) == ["step-00000010"]
    with pytest.raises(CheckpointError, match="the checkpoint is not complete"):
        read_manifest(checkpoint_folder(tmp_path, 5))


def test_half_removed_makes_room_for_the_same_step(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    (checkpoint_folder(tmp_path, 5) / MANIFEST).unlink()
    complete(tmp_path, 5, content="new bytes")
    assert (checkpoint_folder(tmp_path, 5) / "shard-1").read_text() == "new bytes of rank 1"
    verify(checkpoint_folder(tmp_path, 5))


def test_what_cannot_be_removed_is_at_least_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path, 5, 10)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # as if storage refused
    prune(tmp_path, keep=1)
    assert checkpoint_folder(tmp_path, 5).exists()
    assert names(list_checkpoints(tmp_path)) == ["step-00000010"]


# -- a session begins --------------------------------------------------------------------------------------------------


def test_parts_of_a_killed_session_do_not_count(tmp_path: Path) -> None:
    """Of four ranks two had written; two ranks go on, in a generation of the same number."""
    write(tmp_path, 5, [*halves(), *halves()], world=5, content="stale")
    assert names(discard_after(tmp_path, 0)) == [".step-00000005.generation0"]
    complete(tmp_path, 5)
    assert read_manifest(checkpoint_folder(tmp_path, 5)).world == 2
    verify(checkpoint_folder(tmp_path, 5))


def test_what_is_given_up_while_it_grows_never_becomes_complete(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    write(tmp_path, 10, halves())
    aside = tmp_path / ".given-up.step-00000010.generation0"
    aside.mkdir()
    (aside / "shard-0").write_text("of a kill in the middle of this")
    give_up_partial(tmp_path)
    assert commit(tmp_path, 10, 0, {}) is None
    assert names(tmp_path.iterdir()) == ["step-00000005"]
    aside.mkdir()
    assert names(discard_after(tmp_path, 5)) == [aside.name]


def test_a_damaged_checkpoint_that_was_passed_over_is_written_again(tmp_path: Path) -> None:
    complete(tmp_path, 5, 10, 15)
    (checkpoint_folder(tmp_path, 10) / "shard-0").write_text("damaged")
    assert names(discard_after(tmp_path, 5)) == ["step-00000010", "step-00000015"]
    assert names(list_checkpoints(tmp_path)) == ["step-00000005"]
    complete(tmp_path, 10)
    verify(checkpoint_folder(tmp_path, 10))


# -- what is read ------------------------------------------------------------------------------------------------------


def spoil(tmp_path: Path, content: bytes) -> Path:
    complete(tmp_path, 5)
    folder = checkpoint_folder(tmp_path, 5)
    (folder / MANIFEST).write_bytes(content)
    return folder


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b"null"])
def test_a_spoiled_manifest_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    folder = spoil(tmp_path, content)
    with pytest.raises(CheckpointError, match=f"{folder}/{MANIFEST}: ") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    folder = checkpoint_folder(tmp_path, 5)
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads format 1"):
        read_manifest(folder)


def test_a_key_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    complete(tmp_path, 5)
    folder = checkpoint_folder(tmp_path, 5)
    before = read_manifest(folder)
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "later": True}))
    assert read_manifest(folder) == before


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(1, [20]), (2, [15, 20]), (3, [10, 15, 20]), (9, [5, 10, 15, 20])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    complete(tmp_path, 5, 10, 15, 20)
    gone = prune(tmp_path, keep)
    assert names(list_checkpoints(tmp_path)) == [f"step-{step:08d}" for step in kept]
    assert names(gone) == [f"step-{step:08d}" for step in (5, 10, 15, 20) if step not in kept]
    assert not any(folder.exists() for folder in gone)


def test_nothing_is_pruned_before_anything_is_complete(tmp_path: Path) -> None:
    write(tmp_path, 5, halves())
    assert prune(tmp_path, 1) == []
    assert partial_folder(tmp_path, 5, 0).exists()
