"""Who is where: axes, the two grids, groups, boxes."""

from concertina.layout.axis import ATTENTION, ENDS, EXPERT, GROUPS, STAGE, Axis
from concertina.layout.box import Box, cut, cut_by
from concertina.layout.buckets import (
    BUCKET_BYTES,
    Slot,
    plan_buckets,
    plan_slots,
    rank_slots,
    segment_length,
    split_dim,
)
from concertina.layout.chunks import Exchange, chunks, chunks_size, travels_in_ring
from concertina.layout.draw import draw
from concertina.layout.fit import check_job, fits, layout_with
from concertina.layout.fold import Layout
from concertina.layout.grid import Grid
from concertina.layout.seating import Seating
from concertina.layout.segments import Segment, segments
from concertina.layout.shards import Fill, HeadCut, Shard, cut_heads, kv_copies, shards

__all__ = [
    "ATTENTION",
    "BUCKET_BYTES",
    "ENDS",
    "EXPERT",
    "GROUPS",
    "STAGE",
    "Axis",
    "Box",
    "Exchange",
    "Fill",
    "Grid",
    "HeadCut",
    "Layout",
    "Seating",
    "Segment",
    "Shard",
    "Slot",
    "check_job",
    "chunks",
    "chunks_size",
    "cut",
    "cut_by",
    "cut_heads",
    "draw",
    "fits",
    "kv_copies",
    "layout_with",
    "plan_buckets",
    "plan_slots",
    "rank_slots",
    "segment_length",
    "segments",
    "shards",
    "split_dim",
    "travels_in_ring",
]
