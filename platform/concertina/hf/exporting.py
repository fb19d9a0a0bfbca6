"""How does a checkpoint become a folder of Hugging Face's? Layer by layer, in the dtype that is asked for, then read
back as any folder is, and compared.

Tensors are named one expert at a time, as published models are: readers older than transformers 5 know no other names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from concertina.config import ModelConfig, Precision
from concertina.errors import CheckpointError
from concertina.hf.companions import add_tokenizer, generation_config, model_card, special_tokens, write_json
from concertina.hf.config_json import config_json, family_for
from concertina.hf.draft import check_place, check_room, draft_of
from concertina.hf.folder import INDEX, SINGLE, HuggingFaceFolder
from concertina.hf.importing import from_folder
from concertina.hf.oracle import MOST_PARAMETERS, Compared, compare
from concertina.hf.passage import Passage, Tensors, agree, pass_through
from concertina.hf.weights import check_model, from_checkpoint
from concertina.model.families import Family, Piece, family_of, model_config, pieces
from concertina.state.manifest import Manifest, read_manifest, verify
from concertina.state.streamed import Entry, TensorFile

__all__ = ["SHARD_BYTES", "Exported", "Origin", "Wish", "export_checkpoint", "plan_files"]

SHARD_BYTES = 5_000_000_000
_DTYPES: dict[Precision, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from. `companions`: the folder that has its tokenizer, if any has; `facts`: rows of the
    model card."""

    checkpoint: Path
    model: ModelConfig
    name: str
    companions: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """What may be asked of an export; absent: the first family that says the model, the precision of the training. A
    model of more than `most_compared` parameters is not compared with transformers."""

    family: Family | None = None
    dtype: Precision | None = None
    shard_bytes: int = SHARD_BYTES
    most_compared: int = MOST_PARAMETERS


@dataclass(frozen=True)
class Exported:
    """What there is now."""

    folder: Path
    family: Family
    dtype: Precision
    num_tensors: int
    files: tuple[str, ...]
    bytes: int
    tokenizer: bool
    compared: Compared


def export_checkpoint(
    origin: Origin, out: Path, wish: Wish | None = None, on_written: Callable[[Path], None] = lambda _: None
) -> Exported:
    """Write the checkpoint's model to `out`. `on_written` is called before what was written is read.

    Raises ConfigError when no family says the model or the checkpoint is another's, UserError when there is something
    already, and CheckpointError when the checkpoint is damaged or what was written is not what is read.
    """
    wish, model = wish or Wish(), origin.model
    check_place(out)
    family = family_for(model, wish.family)
    manifest = read_manifest(origin.checkpoint)
    check_model(origin.checkpoint, manifest, model)
    dtype = wish.dtype or manifest.facts.get("precision", "float32")
    table = list(pieces(family, model, fused=False))
    files = plan_files(table, _DTYPES[dtype], wish.shard_bytes)
    num_bytes = sum(_size(entry) for entries in files.values() for entry in entries.values())
    check_room(out, num_bytes)
    verify(origin.checkpoint)
    with draft_of(out) as draft:
        tokenizer = _write_companions(origin, manifest, family, dtype, draft)
        if len(files) > 1:
            where = {name: file for file, entries in files.items() for name in entries}
            write_json(draft / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": where})
        written = _write_weights(origin, _DTYPES[dtype], table, files, draft)
        on_written(draft)
        logits = _verify(draft, written, _computing(_DTYPES[dtype]), str(out))
        compared = compare(draft, model, logits, wish.most_compared)
    return Exported(out, family, dtype, len(table), tuple(files), num_bytes, tokenizer, compared)


def plan_files(table: Sequence[Piece], dtype: torch.dtype, most_bytes: int) -> dict[str, dict[str, Entry]]:
    """File to its tensors, in the order of the table; none is larger than that unless a single tensor is."""
    files: list[dict[str, Entry]] = [{}]
    filled = 0
    for piece in table:
        entry = (torch.promote_types(dtype, torch.float32) if piece.wide else dtype, piece.shape)
        if files[-1] and filled + _size(entry) > most_bytes:
            files.append({})
            filled = 0
        files[-1][piece.theirs] = entry
        filled += _size(entry)
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": each for number, each in enumerate(files, 1)}


def _size(entry: Entry) -> int:
    return prod(entry[1]) * entry[0].itemsize


def _computing(dtype: torch.dtype) -> torch.dtype:
    """What logits are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _write_companions(origin: Origin, manifest: Manifest, family: Family, dtype: Precision, draft: Path) -> bool:
    tokens = special_tokens(origin.companions)
    write_json(draft / "config.json", config_json(family, origin.model, dtype, tokens))
    generation_config(origin.companions, draft, tokens)
    layout = manifest.facts.get("layout", {}) if manifest.step else {}
    degrees = " ".join(f"{axis}={degree}" for axis, degree in layout.items()) or None
    facts = {"family": family, "dtype": dtype, "step": manifest.step, "tokens": manifest.facts.get("tokens")}
    card = model_card(origin.name, origin.model, {**facts, "layout it was trained on": degrees, **origin.facts})
    (draft / "README.md").write_text(card, encoding="utf-8")
    return add_tokenizer(origin.companions, draft, origin.model.max_position_embeddings)


def _write_weights(
    origin: Origin, dtype: torch.dtype, table: list[Piece], files: dict[str, dict[str, Entry]], draft: Path
) -> Passage:
    """The table is in the order of the pass, and so are the files: one is open at a time."""
    writer = _Writer(draft, files)

    def write(tensors: Tensors) -> None:
        for piece in table:
            if piece.ours in tensors:
                writer.write(piece.theirs, piece.part(tensors).reshape(piece.shape))

    read = from_checkpoint(origin.checkpoint, rounded_to=dtype)
    passed = pass_through(origin.model, _computing(dtype), read, write)
    writer.close()
    return passed


class _Writer:
    """Files one after the other."""

    def __init__(self, draft: Path, files: dict[str, dict[str, Entry]]) -> None:
        self.draft, self.rest = draft, dict(files)
        self.current: TensorFile | None = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if self.current is None or name not in self.current.entries:
            self.close()
            file = next(iter(self.rest))
            self.current = TensorFile(self.draft / file, self.rest.pop(file), {"format": "pt"})
        self.current.write(name, tensor)

    def close(self) -> None:
        if self.current is not None:
            self.current.close()


def _verify(draft: Path, written: Passage, dtype: torch.dtype, where: str) -> torch.Tensor:
    """Read the folder as an import does: key count, shapes, every weight, logits."""
    try:
        folder = HuggingFaceFolder(draft)
        family, model = family_of(folder.config), model_config(folder.config)
        table = list(pieces(family, model, folder.fused))
        folder.check(table)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", **error.data) from None
    read = pass_through(model, dtype, from_folder(folder, table))
    agree(written, read, where)
    return read.logits
