"""What does a complete checkpoint say of itself? A folder `step-00000050`, its files, and `manifest.json`.

It grows under a name that carries the generation, and is renamed when every rank's part is there: complete or absent.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from concertina.errors import CheckpointError
from concertina.layout import Box

__all__ = [
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "Part",
    "checkpoint_folder",
    "commit",
    "discard",
    "discard_after",
    "list_checkpoints",
    "partial_folder",
    "prune",
    "read_manifest",
    "record_file",
    "record_part",
    "step_of",
    "sync",
    "verify",
]

MANIFEST = "manifest.json"
_GIVEN_UP = ".given-up"
FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class FileRecord(_Record):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Part(_Record):
    """What one rank wrote: its file, and which box of which tensor is in it."""

    rank: int
    world: int
    generation: int
    file: str
    record: FileRecord
    boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    shapes: dict[str, tuple[int, ...]]


class Manifest(_Record):
    """The page that makes a checkpoint complete. `facts` is what the writer wants to know again when it resumes."""

    format: int
    step: int
    world: int
    generation: int
    files: dict[str, FileRecord]
    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the complete checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Whose `checkpoint_folder` it is."""
    return int(folder.name.removeprefix("step-"))


def partial_folder(root: Path, step: int, generation: int) -> Path:
    """Where it grows. An older generation cannot complete a newer one's."""
    return root / f".step-{step:08d}.generation{generation}"


def record_file(path: Path) -> FileRecord:
    """Read a file once and say what it is."""
    return FileRecord(bytes=path.stat().st_size, sha256=_sha256(path))


def record_part(folder: Path, part: Part) -> None:
    """Say that one rank's file is whole and on storage; the last thing a rank does for a checkpoint."""
    sync(folder / part.file)
    _write_json(folder / f"part-{part.rank:05d}.json", part.model_dump())


def commit(root: Path, step: int, generation: int, facts: dict[str, Any]) -> Manifest | None:
    """Complete a checkpoint if every rank's part is there; None while parts are missing. One process calls it.

    Raises CheckpointError when parts do not make up the whole, or `facts` are another step's.
    """
    if facts.get("step", step) != step:
        raise CheckpointError(f"{root}: facts of step {facts['step']} cannot stand beside the weights of step {step}")
    partial, final = partial_folder(root, step, generation), checkpoint_folder(root, step)
    pages = sorted(partial.glob("part-*.json"))
    parts = [Part.model_validate_json(page.read_text()) for page in pages[:1]]
    if not parts or len(pages) < parts[0].world:
        return None  # asked once a rank: each looks at one page, only the last at all
    parts += [Part.model_validate_json(page.read_text()) for page in pages[1:]]
    shapes = _check_coverage(parts)
    manifest = Manifest(
        format=FORMAT,
        step=step,
        world=parts[0].world,
        generation=generation,
        files={part.file: part.record for part in parts},
        shapes=shapes,
        facts=facts,
    )
    if (final / MANIFEST).exists():  # the same step again, after a roll back: the bytes there are as good
        shutil.rmtree(partial)
        return read_manifest(final)
    shutil.rmtree(final, ignore_errors=True)  # what a kill left of one that was being removed
    _write_json(partial / MANIFEST, manifest.model_dump())
    sync(partial)
    partial.rename(final)
    sync(root)
    # Last: a kill before this line leaves parts to commit again, or a complete checkpoint with pages nobody reads.
    for path in final.glob("part-*.json"):
        path.unlink()
    return manifest


def _check_coverage(parts: list[Part]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors; refuses unless the parts' boxes tile each of them exactly."""
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Box]] = {}
    for part in parts:
        shapes.update(part.shapes)
        for key, (start, stop) in part.boxes.items():
            boxes.setdefault(key, []).append(Box(start, stop))
    for key, shape in shapes.items():
        if not _tiles(boxes[key], shape):
            covered, size = sum(box.size for box in boxes[key]), Box.whole(shape).size
            text = f"{key}: the ranks wrote {covered} of {size} elements, in boxes that leave gaps or overlap"
            raise CheckpointError(text, tensor=key)
    return shapes


def _tiles(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes cover a tensor, no element twice.

    A box is the sum of the orthants at its corners, with signs; so boxes tile the whole exactly when all corners
    cancel against the whole's. Linear in their number, for any cuts.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, box in [(-1, Box.whole(shape)), *((1, box) for box in boxes)]:
        if box.size:
            for ends in product(*(((start, 1), (stop, -1)) for start, stop in zip(box.start, box.stop, strict=True))):
                corners[tuple(at for at, _ in ends)] += sign * prod(side for _, side in ends)
    return not any(corners.values())


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in root.glob(f"step-*/{MANIFEST}"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint. Raises CheckpointError if there is none or it cannot be read."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: the checkpoint is not complete") from None
    except ValidationError as error:
        raise CheckpointError(f"{folder}/{MANIFEST}: {error.errors()[0]['msg']}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.format}, this version reads format {FORMAT}")
    return manifest


def verify(folder: Path, reader: int = 0, readers: int = 1) -> Manifest:
    """Read every byte, or what is this reader's share where several do. Raises CheckpointError naming the first file
    that is missing, short or altered."""
    manifest = read_manifest(folder)
    for name, record in list(manifest.files.items())[reader::readers]:
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: missing", file=name)
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {record.bytes}", file=name)
        if _sha256(path) != record.sha256:
            raise CheckpointError(f"{path}: sha256 differs from the manifest's", file=name)
    return manifest


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoints, and partial ones of steps before the newest. Of its own
    step another generation may be writing one: that goes when its last part has come, or with the next step."""
    complete = list_checkpoints(root)
    gone = complete[:-keep]
    if complete:
        newest = complete[-1].name
        gone += [path for path in root.glob(".step-*") if path.name[1:].split(".")[0] < newest]
    _remove(gone)
    return gone


def give_up_partial(root: Path) -> None:
    """None of those that grow may become complete any more: what they are of is given up, and may be done again.

    Put aside first, whole: of one that is completed at this moment either everything is there, or nothing.
    """
    for path in root.glob(".step-*"):
        aside = root / f"{_GIVEN_UP}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)  # what a kill left of one that was put aside before
        with suppress(OSError):  # it has just been completed, or removed
            path.rename(aside)
            shutil.rmtree(aside)


def discard_after(root: Path, step: int) -> list[Path]:
    """Remove what a session that begins at `step` does again: later checkpoints, and all that never became one.

    Parts of a killed session would otherwise be counted among this one's, and a damaged checkpoint that it passed over
    would be kept in the place of its own.
    """
    later = [path for path in root.glob("step-*") if path.name > checkpoint_folder(root, step).name]
    gone = sorted([*later, *root.glob(".step-*"), *root.glob(f"{_GIVEN_UP}*")])
    _remove(gone)
    return gone


def discard(folder: Path) -> None:
    """Remove one that is damaged, or its step could not be written again."""
    _remove([folder])


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        # The manifest goes first: a half-removed checkpoint must not look complete.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
