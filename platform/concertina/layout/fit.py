"""Does a job's layout fit its world, its model and its batch? If not: every misfit, with the values that work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from concertina.errors import LayoutError
from concertina.layout.fold import Layout
from concertina.layout.refusals import Degrees, Fault, misfits, world_faults

if TYPE_CHECKING:  # building the schema takes longer than printing 16,384 ranks
    from concertina.config import Job, ModelConfig

__all__ = ["check_job", "fits", "layout_with"]


def check_job(job: Job) -> Layout:
    """The layout of a job on all its workers.

    Raises LayoutError with every misfit: `data["problems"]` the lines, `data["keys"]` the job file's key of each.
    """
    world, degrees = job.cluster.num_workers, job.layout.degrees

    def faults(degrees: Degrees) -> list[Fault]:
        return [*world_faults(world, degrees), *_shape_faults(job.model, job.data.sequence_length, degrees)]

    found = [(f"layout.{axis}", line) for axis, line in misfits(world, degrees, faults)]
    found = found or [*_stage_misfits(job), *_batch_misfits(job, _dp(world, degrees))]
    if not found:
        return layout_with(job, world, degrees)
    lines = [line for _, line in found]
    raise LayoutError("\n".join(lines), problems=lines, keys=[key for key, _ in found])


def layout_with(job: Job, world: int, degrees: Degrees) -> Layout:
    """The layout of these degrees, which fit; stages have the job's pieces and layers where they are as many as its."""
    wanted, pp = job.layout, degrees["pp"]
    virtual = wanted.virtual_stages if pp > 1 and pp * wanted.virtual_stages <= job.model.num_hidden_layers else 1
    as_wanted = pp > 1 and pp == wanted.pp and virtual == wanted.virtual_stages
    return Layout(world, **degrees, virtual=virtual, stage_layers=(wanted.stage_layers or ()) if as_wanted else ())


def fits(job: Job, world: int, degrees: Degrees) -> bool:
    """Whether `check_job` would take the job on `world` workers with these degrees (pp, cp, tp, ep, etp)."""
    if world_faults(world, degrees):
        return False
    if next(_shape_faults(job.model, job.data.sequence_length, degrees), None) is not None:
        return False
    return next(_batch_misfits(job, _dp(world, degrees)), None) is None


def _dp(world: int, degrees: Degrees) -> int:
    return world // (degrees["pp"] * degrees["cp"] * degrees["tp"])


def _shape_faults(model: ModelConfig, sequence_length: int, degrees: Degrees) -> Iterator[Fault]:
    """What the model refuses. Heads and widths must divide; layers, experts and chunks may be uneven, not empty."""
    for axis, widths in (("tp", _dense_widths(model)), ("etp", _expert_widths(model))):
        for name, width in widths.items():
            if width % degrees[axis]:
                yield Fault(axis, "must divide", f"model.{name}={width}")
    heads = model.num_key_value_heads
    if heads % degrees["tp"] and degrees["tp"] % heads:
        yield Fault("tp", "must divide or be a multiple of", f"model.num_key_value_heads={heads}")
    limits = {
        "pp": ("model.num_hidden_layers", model.num_hidden_layers),
        "cp": ("data.sequence_length/2", max(1, sequence_length // 2)),  # a chunk from each end, balanced
        "ep": ("model.num_experts", model.num_experts),
    }
    for axis, (name, limit) in limits.items():
        if degrees[axis] > limit:
            yield Fault(axis, "is more than", f"{name}={limit}")


def _dense_widths(model: ModelConfig) -> dict[str, int]:
    """What tp cuts."""
    widths = {"num_attention_heads": model.num_attention_heads}
    if model.mlp_only_layers:
        widths["intermediate_size"] = model.intermediate_size
    if model.shared_expert_intermediate_size:
        widths["shared_expert_intermediate_size"] = model.shared_expert_intermediate_size
    return widths


def _expert_widths(model: ModelConfig) -> dict[str, int]:
    """What etp cuts."""
    has_experts = any(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    return {"moe_intermediate_size": model.moe_intermediate_size} if has_experts else {}


def _stage_misfits(job: Job) -> Iterator[tuple[str, str]]:
    """What cannot be said of the job's pipeline stages."""
    layout, layers = job.layout, job.model.num_hidden_layers
    pieces, virtual = layout.pp * layout.virtual_stages, f"virtual_stages={layout.virtual_stages}"
    if layout.virtual_stages > 1 and layout.pp == 1:
        yield "layout.virtual_stages", f"{virtual} needs stages: set layout.pp to 2 or more"
    elif pieces > layers:
        most = layers // layout.pp
        text = f"{virtual} times pp={layout.pp} is more than model.num_hidden_layers={layers}"
        yield "layout.virtual_stages", f"{text}: set layout.virtual_stages to {most} or less"
    given = layout.stage_layers
    if given is not None and (len(given) != pieces or sum(given) != layers):
        text = f"stage_layers has {len(given)} numbers that add up to {sum(given)}"
        yield "layout.stage_layers", f"{text}: give {pieces} (pp * virtual_stages) that add up to {layers} layers"


def _batch_misfits(job: Job, dp: int) -> Iterator[tuple[str, str]]:
    """A rank of dp needs a sequence, and where tokens are dropped a whole capacity group of them."""
    batch, whole = job.training.global_batch_size, job.model.capacity.whole_sequences
    micro, most = job.training.micro_batch_size, batch // whole
    if batch % whole:
        yield _parted("global_batch_size", batch, whole, dp * whole)
    elif most < dp:
        lacking = f"ranks without a {'sequence' if whole == 1 else f'capacity group of {whole} sequences'}"
        text = f"global_batch_size={batch} leaves {dp - most} of dp={dp} {lacking}"
        yield "training.global_batch_size", f"{text}: set training.global_batch_size to {dp * whole} or more"
    if micro is not None and micro % whole:
        yield _parted("micro_batch_size", micro, whole, whole)


def _parted(key: str, sequences: int, whole: int, least: int) -> tuple[str, str]:
    below = max(sequences - sequences % whole, least)
    text = f"{key}={sequences} is no multiple of model.capacity.group_sequences={whole}"
    return f"training.{key}", f"{text}: set training.{key} to {below} or {below + whole}"
