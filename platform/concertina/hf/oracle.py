"""What does transformers say to the same tokens? Asked where it is installed and the model is small, and only to check.

It holds the whole model, in fp32: up to `MOST_PARAMETERS`, 1 GiB. Its way of adding up differs from ours in the last
bits, and rounding can send a token to another expert where two are nearly equal; so one sequence of four may be off.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concertina.config import ModelConfig, count_parameters
from concertina.errors import CheckpointError
from concertina.hf.passage import tokens_for

__all__ = ["MOST_PARAMETERS", "Compared", "compare"]

MOST_PARAMETERS = 1 << 28
_BOUND = 1e-4
_SEQUENCES_OFF = 1

Compared = str | None
"""What it was compared with; None: with nobody."""


def compare(
    folder: Path,
    model: ModelConfig,
    logits_BSV: Tensor,
    most_parameters: int = MOST_PARAMETERS,
    left_out: Collection[str] = (),
) -> Compared:
    """Compare our logits of a folder of theirs with those of transformers, of models up to so many parameters. Raises
    CheckpointError where it finds other tensors than it wants, but for those that we leave out too, or says something
    else."""
    if count_parameters(model).total > most_parameters:
        return None
    try:
        import transformers

        theirs, found = _load(transformers, folder)
    except (ImportError, ValueError):  # it is not there, or does not know the family
        return None
    wrong = {kind: sorted(names - set(left_out)) for kind, names in found.items() if names - set(left_out)}
    if wrong:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} finds {wrong}", **wrong)
    tokens_BS = tokens_for(model)
    with torch.no_grad():
        said_BSV = theirs(input_ids=tokens_BS).logits.to(logits_BSV.dtype)
    errors_B = ((said_BSV - logits_BSV).abs().amax((1, 2)) / said_BSV.abs().amax((1, 2))).tolist()
    if sum(not error <= _BOUND for error in errors_B) > _SEQUENCES_OFF:  # not <=: NaN is off too
        text = f"logits of {len(errors_B)} sequences are off by " + ", ".join(f"{error:.2g}" for error in errors_B)
        raise CheckpointError(
            f"{folder}: {text} against transformers {transformers.__version__}, at most {_BOUND:g} is rounding",
            errors=errors_B,
        )
    return f"transformers {transformers.__version__}"


def _load(transformers: Any, folder: Path) -> tuple[Any, dict[str, set[str]]]:
    """Their model in fp32, and the names of tensors that are missing, surplus or of another shape."""
    shown, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
    finally:
        transformers.logging.set_verbosity(shown)
        if bars:
            transformers.logging.enable_progress_bar()
    return theirs.eval(), {
        kind: {str(name) for name in found[kind]} for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
