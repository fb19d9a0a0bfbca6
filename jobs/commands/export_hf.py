"""How does a checkpoint get out, for others to read? `concertina export hf latent exported`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.output import Output, OutputOption, next_commands, print_json, said_written, short_bytes

if TYPE_CHECKING:
    from concertina.config import ModelConfig
    from concertina.hf.exporting import Origin
    from concertina.track.run import RunFolder

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Checkpoints written as others read them.")


FamilyName = Literal["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
"""`concertina.model.families.Family`, which takes torch to import."""

Dtype = Literal["bfloat16", "float32", "float64"]
"""Those of `training.precision`."""


@app.callback()
def _group() -> None:
    """A group also while it has one command."""


@app.command("hf")
def export_hf(
    checkpoint: Annotated[
        str, typer.Argument(metavar="RUN|CKPT_DIR", help="A run (its newest checkpoint), or a checkpoint's folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="The folder to make; not there yet.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; absent: the precision of the training.")] = None,
    family: Annotated[FamilyName | None, typer.Option(help="Absent: the first that says all of the model.")] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Size of a file, at most.")] = 5_000_000_000,
    job: Annotated[
        str | None, typer.Option(metavar="JOB", help="The job file, for a checkpoint that has none beside it.")
    ] = None,
    storage: Annotated[str, typer.Option(help="Folder of runs.")] = "runs",
    output: OutputOption = Output.TEXT,
) -> None:
    """Write a checkpoint as a Hugging Face model.

    \b
    One layer is in memory at a time. What was written is read back and compared, weights bit for bit and logits of a
    few tokens; those also with transformers where it is installed and the model small. Exit code 105 when they differ.

    \b
    Example:
      concertina export hf latent exported
    """
    from concertina.hf.exporting import Wish, export_checkpoint
    from jobs.which_checkpoint import find_checkpoint

    origin = _origin(find_checkpoint(checkpoint, storage), job)
    done = export_checkpoint(origin, out, Wish(family, dtype, shard_bytes), said_written)
    if output is Output.JSON:
        facts = {"folder": str(out), "checkpoint": str(origin.checkpoint), "family": done.family, "dtype": done.dtype}
        more = {"tensors": done.num_tensors, "files": list(done.files), "bytes": done.bytes}
        said = {"tokenizer": done.tokenizer, "verified": True, "compared_with": done.compared}
        print_json({**facts, **more, **said})
        return
    beside = f"; {done.compared} says the same" if done.compared else ""
    files = f"{len(done.files)} files" if len(done.files) > 1 else "1 file"
    sys.stdout.write(
        f"{out}: a {done.family} in {done.dtype}, {short_bytes(done.bytes)} in {files}\n"
        f"  from       {origin.checkpoint}\n"
        f"  verified   {done.num_tensors} tensors, shapes, every weight, logits{beside}\n"
        f"  tokenizer  {'copied' if done.tokenizer else 'none: the run has none'}\n"
    )
    next_commands([(f"concertina import hf {out} CKPT_DIR", "a checkpoint of it again")])


def _origin(checkpoint: Path, job: str | None) -> Origin:
    """A run's job file says what a checkpoint of it is of, and an import's `model.yaml`."""
    from concertina.hf.exporting import Origin
    from concertina.hf.importing import MODEL_FILE

    run = _run_of(checkpoint)
    if job is not None:
        from jobs.opening import open_job

        return Origin(checkpoint, open_job(job).job.model, job, checkpoint)
    if (checkpoint / MODEL_FILE).is_file():
        return Origin(checkpoint, _imported_model(checkpoint / MODEL_FILE), checkpoint.resolve().name, checkpoint)
    if run is None:
        from concertina.errors import ConfigError

        raise ConfigError(f"{checkpoint}: no job file beside it says what model it is of: give one with --job")
    return Origin(checkpoint, run.job().model, run.run_id, _tokenizer_of(run), _facts(run, checkpoint))


def _run_of(checkpoint: Path) -> RunFolder | None:
    from concertina.track.run import RunFolder

    run = RunFolder(checkpoint.resolve().parent.parent)
    return run if run.job_file.is_file() and run.checkpoints == checkpoint.resolve().parent else None


def _imported_model(path: Path) -> ModelConfig:
    from pydantic import ValidationError

    from concertina.config import ModelConfig
    from concertina.config.yaml12 import parse
    from concertina.errors import ConfigError

    tree, problems = parse(path.read_text(encoding="utf-8"), str(path))
    try:
        assert not problems, problems
        return ModelConfig.model_validate(tree.plain()["model"])
    except (AssertionError, KeyError, TypeError, ValidationError):
        raise ConfigError(f"{path}: does not say what model this is of: give a job file with --job") from None


def _tokenizer_of(run: RunFolder) -> Path | None:
    """The folder of its tokens has the tokenizer they were made with."""
    data = run.data_facts()
    return Path(data.path) if data is not None and data.path else None


def _facts(run: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """Rows of the model card: the run, its losses at that step as far as they are known, its corpus."""
    from concertina.state.manifest import read_manifest
    from concertina.track.summary import summarize

    progress, step, data = summarize(run).progress, read_manifest(checkpoint).step, run.data_facts()
    losses = {
        "training loss": progress.train_loss if progress.steps == step else None,
        "validation loss": dict(progress.evaluations).get(step),
    }
    return {
        "run": run.run_id,
        **{kind: f"{loss:.4f}" for kind, loss in losses.items() if loss is not None},
        "corpus": None if data is None else f"{data.name} ({data.fingerprint})",
    }
