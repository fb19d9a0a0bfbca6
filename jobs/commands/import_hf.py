"""How does a published model become a checkpoint to begin from? `concertina import hf exported imported`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.output import Output, OutputOption, next_commands, print_json, said_written, short_number

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Checkpoints made from what others have written.")


@app.callback()
def _group() -> None:
    """A group also while it has one command."""


@app.command("hf")
def import_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC_DIR", help="A folder with config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="CKPT_DIR", help="The checkpoint to make; not there yet.")],
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a checkpoint of a Hugging Face model: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3.

    \b
    One layer is in memory at a time. What was written is read back and compared, weights bit for bit and logits of a
    few tokens; those also with transformers where it is installed and the model small. Exit code 105 when they differ.

    \b
    Example:
      concertina import hf exported imported
    """
    from concertina.config import count_parameters
    from concertina.hf.importing import MODEL_FILE, import_folder

    done = import_folder(source, target, said_written)
    total, active = count_parameters(done.model)
    if output is Output.JSON:
        facts = {"folder": str(target), "family": done.family, "tensors": done.num_tensors}
        more = {"left_out": list(done.left_out), "parameters": total, "active_parameters": active}
        print_json({**facts, **more, "verified": True, "compared_with": done.compared})
        return
    beside = f"; {done.compared} says the same" if done.compared else ""
    left = f"  left out   {len(done.left_out)} tensors that no layer has a place for\n" if done.left_out else ""
    sys.stdout.write(
        f"{target}: a {done.family}, {short_number(total)} parameters, {short_number(active)} active\n"
        f"  verified   {done.num_tensors} tensors, shapes, every weight, logits{beside}\n{left}"
        f"  model      {target / MODEL_FILE}, to `extends` in a job file\n"
    )
    next_commands(
        [
            (f"concertina ckpt inspect {target}", "its tensors"),
            (f"concertina export hf {target} OUT_DIR", "and back"),
        ]
    )
