"""How does a folder of Hugging Face's become a checkpoint? Layer by layer into master weights of step 0, then read back
and compared.

The checkpoint is one as any other, of one part, without moments: it is what a run begins from, not a run that goes on.
Beside it lie `model.yaml`, a job file to extend, and what is theirs and not weights: tokenizer, config.json.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from concertina.config import AnomalyConfig, ModelConfig, Precision
from concertina.config.yaml12 import dump
from concertina.hf.companions import COMPANIONS, TOKENIZER
from concertina.hf.draft import check_place, check_room, draft_of
from concertina.hf.folder import HuggingFaceFolder
from concertina.hf.oracle import MOST_PARAMETERS, Compared, compare
from concertina.hf.passage import Fill, Tensors, agree, pass_through
from concertina.hf.weights import from_checkpoint, key_of, shapes_of
from concertina.layout import Layout
from concertina.model.families import Family, Piece, family_of, model_config, pieces
from concertina.state.manifest import commit, partial_folder
from concertina.state.streamed import StreamedPart
from concertina.train.anomaly import AnomalyWatch

__all__ = ["MODEL_FILE", "Imported", "from_folder", "import_folder"]

MODEL_FILE = "model.yaml"
_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Imported:
    """`left_out`: tensors of theirs that no layer of ours has a place for, all of them known ones."""

    folder: Path
    family: Family
    model: ModelConfig
    num_tensors: int
    left_out: tuple[str, ...]
    compared: Compared


def import_folder(
    source: Path,
    target: Path,
    on_written: Callable[[Path], None] = lambda _: None,
    most_compared: int = MOST_PARAMETERS,
) -> Imported:
    """Make the checkpoint `target` of the model in `source`. `on_written` is called before what was written is read;
    a model of more than `most_compared` parameters is not compared with transformers.

    Raises NotFoundError, ConfigError for what is not supported, UserError when there is something already, and
    CheckpointError when a folder is not whole or what was written is not what is read.
    """
    check_place(target)
    folder = HuggingFaceFolder(source)
    family, model = family_of(folder.config), model_config(folder.config)
    table, ignored = list(pieces(family, model, folder.fused)), _left_out(family, model)
    folder.check(table, ignored)
    precision = _PRECISIONS[folder.dtype(table)]
    master = torch.float64 if precision == "float64" else torch.float32
    shapes = shapes_of(model)
    check_room(target, sum(map(prod, shapes.values())) * master.itemsize)
    with draft_of(target) as root:
        part = StreamedPart(partial_folder(root, 0, 0), {key_of(name): (master, shapes[name]) for name in shapes})

        def write(tensors: Tensors) -> None:
            for name, tensor in tensors.items():
                part.write(key_of(name), tensor)

        passed = pass_through(model, master, from_folder(folder, table), write)
        part.finish()
        commit(root, 0, 0, _facts(family, precision))
        (made,) = root.iterdir()
        on_written(made)
        agree(passed, pass_through(model, master, from_checkpoint(made)), str(target))
        surplus = tuple(sorted(folder.tensors.keys() - {piece.theirs for piece in table}))
        compared = compare(source, model, passed.logits, most_compared, surplus)
        _add_companions(source, made, target, model, precision)
        for path in made.iterdir():
            path.rename(root / path.name)
        made.rmdir()
    return Imported(target, family, model, len(table), surplus, compared)


def from_folder(folder: HuggingFaceFolder, table: Iterable[Piece]) -> Fill:
    """Reads weights of a folder of theirs."""
    by_ours: dict[str, list[Piece]] = defaultdict(list)
    for piece in table:
        by_ours[piece.ours].append(piece)

    def fill(tensors: Tensors) -> None:
        for name in tensors:
            folder.fill(by_ours[name], tensors)

    return fill


def _left_out(family: Family, model: ModelConfig) -> list[str]:
    """Beginnings of names that have no place here: layers that predict a token more (DeepSeek's, behind the last one),
    and a head that is the embedding once more."""
    found = ["lm_head.weight"] if model.tie_word_embeddings else []
    return [*found, f"model.layers.{model.num_hidden_layers}."] if family == "deepseek_v3" else found


def _facts(family: Family, precision: Precision) -> dict[str, Any]:
    """Those of a run that has not begun."""
    begun = {"step": 0, "tokens": 0, "updates": 0, "anomalies": AnomalyWatch(AnomalyConfig()).state()}
    return {**begun, "layout": Layout(1).degrees, "precision": precision, "imported_from": family}


def _add_companions(source: Path, made: Path, target: Path, model: ModelConfig, precision: Precision) -> None:
    for name in ("config.json", *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, made / name)
    document: dict[str, Any] = {"model": model.model_dump(mode="json"), "training": {"precision": precision}}
    if (source / TOKENIZER).is_file():
        document["data"] = {"tokenizer": {"path": str(target.resolve() / TOKENIZER)}}
    (made / MODEL_FILE).write_text(
        "# The model of this checkpoint: `extends` it in a job file, and give name, data, training and layout.\n"
        + dump(document)
    )
