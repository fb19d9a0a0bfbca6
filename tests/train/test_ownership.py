"""Does a rank ever allocate more than its own: building its model, its engine, loading a checkpoint?

Every matrix is cut here, and every whole one is larger than all that a rank may ask for beside its boxes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from concertina.config import Job
from concertina.layout import Box, Layout, Seating, Shard
from concertina.model import Decoder
from concertina.model.init import initialize
from concertina.planner.memory import rank_bytes
from concertina.state.checkpoint import load_boxes, write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from tests.allocations import recorded
from tests.distributed import seat
from tests.train.worlds import seated_engine, tiny_job

pytestmark = pytest.mark.unit

MiB = 1 << 20
DRAW_BYTES = 16 * MiB
"""Of a draw: seven int64 or float64 numbers for each of 2^18 elements."""
READ_BYTES = MiB
"""Of a load: plans of reads, headers of files."""

NEW = Layout(8, tp=8, ep=4, etp=2)
OLD = {"one rank": Layout(1), "experts over three": Layout(3, ep=3), "another cut": Layout(4, tp=2, ep=2, etp=2)}


def job_of(vocabulary: int, hidden: int, width: int) -> Job:
    model = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "mlp_only_layers": [],
        "num_experts": 8,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 0,
        "tie_word_embeddings": True,
    }
    return tiny_job(model=model, training__precision="float32")


BUILT, LOADED = job_of(8192, 512, 1024), job_of(4096, 128, 512)


def largest(shapes: Iterable[tuple[int, ...]]) -> int:
    return max(Box.whole(shape).size for shape in shapes) * 4


def smallest(shards: Iterable[Shard]) -> int:
    """Bytes of the smallest of the large matrices, whole."""
    large = [shard for shard in shards if shard.expert or shard.name == "embedding.weight"]
    return min(Box.whole(shard.global_shape).size for shard in large) * 4


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first engine and the first checkpoint import is nobody's tensor."""
    engine = seated_engine(tiny_job(), Layout(1), 0)
    load_boxes(written(tmp_path_factory.mktemp("first"), tiny_job(), Layout(1)), engine.state())


def written(root: Path, job: Job, layout: Layout) -> Path:
    """A checkpoint of ranks that have not taken a step."""
    for rank in range(layout.world):
        state = seated_engine(job, layout, rank).state()
        write_part(partial_folder(root, 1, 0), state, rank=rank, world=layout.world, generation=0)
    assert commit(root, 1, 0, {}) is not None
    return checkpoint_folder(root, 1)


@pytest.mark.parametrize("rank", [0, 7])
def test_building_a_decoder(rank: int) -> None:
    groups = seat(NEW, rank)
    with recorded(python=True) as found:
        decoder = Decoder(BUILT.model, torch.float32, torch.device("cpu"), groups, 0)
    shards = decoder.shards.values()
    own = rank_bytes(BUILT.model, NEW, "float32", rank).weights
    assert found.kept_bytes == own
    assert found.peak_bytes <= own + DRAW_BYTES
    assert found.largest_bytes == largest(shard.box.shape for shard in shards)
    assert found.python_peak_bytes < READ_BYTES
    assert found.largest_bytes < smallest(shards) / 2


def test_building_an_engine() -> None:
    """What stays is what the planner counts, to the byte."""
    with recorded(python=True) as found:
        engine = seated_engine(BUILT, NEW, 3)
    counted = rank_bytes(BUILT.model, NEW, "float32", 3)
    assert found.kept_bytes == counted.total
    assert counted.second_copies == 0
    assert found.peak_bytes <= counted.total + DRAW_BYTES
    assert found.largest_bytes < smallest(engine.shards.values())


def test_building_an_engine_that_keeps_copies_of_two_others() -> None:
    seating = Seating(NEW, tuple(range(NEW.world)), tuple(3 if rank in (0, 5) else None for rank in range(NEW.world)))
    with recorded(python=True) as found:
        engine = seated_engine(BUILT, NEW, 3, seating)
    counted = rank_bytes(BUILT.model, NEW, "float32", 3, (0, 5))
    assert sorted(engine.share.seconds.copies) == [0, 5]
    assert found.kept_bytes == counted.total
    assert found.peak_bytes <= counted.total + DRAW_BYTES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: written(tmp_path_factory.mktemp("old"), LOADED, layout) for name, layout in OLD.items()}


@pytest.mark.parametrize("old", OLD)
def test_loading_a_checkpoint_of_another_layout(old: str, folders: dict[str, Path]) -> None:
    """The boxes are there before; nothing comes to them, not even for a slice of a file that holds the whole."""
    for rank in (0, 7):
        engine = seated_engine(LOADED, NEW, rank)
        with recorded(python=True) as found:
            load_boxes(folders[old], engine.state())
        assert found.peak_bytes + found.python_peak_bytes < READ_BYTES
        assert smallest(engine.shards.values()) > READ_BYTES


# -- mutations: each makes a whole tensor on the way, and the record must see it -----------------------------------


def test_a_whole_tensor_drawn_is_seen() -> None:
    shape = (2048, 1024)
    with recorded(python=True) as found:
        whole = torch.empty(shape)
        kept = initialize("embedding.weight", shape, Box.whole(shape), 1.0, 0, whole)[:256].clone()
        del whole
    assert found.kept_bytes == kept.nbytes == MiB
    assert found.largest_bytes == 8 * MiB
    assert 9 * MiB <= found.peak_bytes <= 8 * MiB + DRAW_BYTES


@pytest.mark.parametrize("read", ["a clone of the whole", "the whole file"])
def test_a_whole_tensor_read_is_seen(read: str, folders: dict[str, Path]) -> None:
    (file,) = folders["one rank"].glob("*.safetensors")
    with recorded(python=True) as found, safe_open(file, "pt") as opened:
        whole = opened.get_tensor("master/layers.0.moe.experts.w13")
        content: Any = whole.clone() if read == "a clone of the whole" else file.read_bytes()
    assert len(content)
    assert found.peak_bytes + found.python_peak_bytes > 4 * READ_BYTES - 1
