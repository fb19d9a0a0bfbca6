"""What checkpoints are there, what is in them, are they sound? `concertina ckpt list latest`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.output import Output, OutputOption, TableOption, TableOutput, next_commands, print_json, print_table
from jobs.which_checkpoint import find_checkpoint, find_root

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Checkpoints of a run.")

Where = Annotated[
    str, typer.Argument(metavar="RUN|DIR", help="A run (its id, a beginning of it, latest), or a folder.")
]
Storage = Annotated[str, typer.Option(help="Folder of runs.")]


@app.command("list")
def list_(run: Where = "latest", storage: Storage = "runs", output: TableOption = TableOutput.TEXT) -> None:
    """List a run's complete checkpoints, oldest first.

    \b
    Example:
      concertina ckpt list latest
    """
    from concertina.state.manifest import list_checkpoints, read_manifest

    root = find_root(run, storage)
    rows = []
    for folder in list_checkpoints(root):
        manifest = read_manifest(folder)
        tokens = manifest.facts.get("tokens")
        rows.append([manifest.step, tokens, manifest.bytes, manifest.world, _degrees(manifest.facts), str(folder)])
    print_table(["step", "tokens", "bytes", "ranks", "layout", "folder"], rows, output)
    if output is TableOutput.TEXT and rows:
        newest = rows[-1][-1]
        next_commands(
            [(f"concertina ckpt verify {newest}", "read every byte"), (f"concertina ckpt inspect {newest}", "tensors")]
        )


@app.command()
def inspect(checkpoint: Where, storage: Storage = "runs", output: OutputOption = Output.TEXT) -> None:
    """Show what a checkpoint holds: its facts, its files, its tensors. A run means its newest checkpoint.

    \b
    Example:
      concertina ckpt inspect latest
    """
    from concertina.state.manifest import read_manifest

    folder = find_checkpoint(checkpoint, storage)
    manifest = read_manifest(folder)
    if output is Output.JSON:
        print_json({"folder": str(folder), **manifest.model_dump()})
        return
    facts = {key: value for key, value in manifest.facts.items() if key not in ("anomalies", "layout")}
    told = {"folder": folder, "layout": _degrees(manifest.facts), **facts, "bytes": manifest.bytes}
    width = max(map(len, told))
    for key, value in told.items():
        sys.stdout.write(f"{key:<{width}}  {value}\n")
    rows = [[name, "x".join(map(str, shape))] for name, shape in manifest.shapes.items() if name.startswith("master/")]
    sys.stdout.write("\n")
    print_table(["tensor (also exp_avg, exp_avg_sq)", "shape"], rows)
    next_commands([(f"concertina ckpt verify {folder}", "read every byte")])


@app.command()
def verify(checkpoint: Where, storage: Storage = "runs", output: OutputOption = Output.TEXT) -> None:
    """Read every byte of a checkpoint and compare it with the manifest. Exit code 105 when it differs.

    \b
    Example:
      concertina ckpt verify latest
    """
    from concertina.state.manifest import verify as verify_folder

    folder = find_checkpoint(checkpoint, storage)
    manifest = verify_folder(folder)
    if output is Output.JSON:
        print_json({"folder": str(folder), "step": manifest.step, "bytes": manifest.bytes, "sound": True})
    else:
        sys.stdout.write(f"{folder}: sound, {len(manifest.files)} files, {manifest.bytes} bytes\n")


def _degrees(facts: dict[str, object]) -> str:
    layout = facts.get("layout")
    if not isinstance(layout, dict):
        return "-"
    return " ".join(f"{axis}{degree}" for axis, degree in layout.items() if axis != "world" and degree != 1) or "1"
