"""A member computes three times slower than the others, or wrong: is it found, and what does the run do about it?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from concertina.elastic.stragglers import Kind, StragglerNews
from concertina.track.events import EventType
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import ENDLESS, write_job
from tests.actors.stage import BOUND_S, NO_CHECKPOINT, NothingLeft, Reference, Stage, trained_alone

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    """Steps of a quarter of a second and more, of 24 sequences."""
    folder = Path(tempfile.mkdtemp(prefix="concertina-slow-"))
    job = write_job(folder)
    document: dict[str, Any] = yaml.safe_load(job.read_text())
    document["model"] |= {"hidden_size": 64, "moe_intermediate_size": 128, "intermediate_size": 128}
    document["data"]["sequence_length"] = 128
    document["training"]["global_batch_size"] = 24
    document["layout"] = {}
    job.write_text(yaml.safe_dump(document))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


def test_a_bit_that_flips_costs_its_rank_and_no_step(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """One low bit of one weight, which no loss would show: the step that it was used in is applied by nobody."""
    words = ("--set", ENDLESS, "--set", "training.eval_every_steps=100000", "--set", "elastic.verify_every_steps=1")
    stage = Stage(start(*words, *NO_CHECKPOINT, "--set", "cluster.num_workers=3"), cluster)
    member = stage.seating().members[1]
    step = list(stage.drive.steps())[-1] + 3
    stage.do(f"corrupt rank=1 step={step}")
    stage.settles(0)
    assert stage.drive.lost()[member].startswith("hardware: silent corruption, seen before step")
    assert "weights of rank 1 are not those of its replicas" in stage.drive.lost()[member]
    (first, *_) = stage.drive.recoveries()
    assert (first.cause.reason, first.world_after) == ("hardware", 2)
    assert stage.drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)


def test_who_is_slow_gets_fewer_sequences(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Two ranks on two cores; the oracle is one process, as ever: who computes what changes nothing."""
    words = ("--set", ENDLESS, "--set", "training.eval_every_steps=100000", "--set", "elastic.stragglers=act")
    stage = Stage(start(*words, *NO_CHECKPOINT), cluster)
    stage.do("slow rank=1 factor=3 for=300")

    def news() -> list[StragglerNews]:
        return [StragglerNews.from_json(event.data) for event in stage.drive.events(EventType.STRAGGLER)]

    stage.drive.wait(lambda: any(found.measured_s is not None for found in news()), BOUND_S)
    found, measured = news()[:2]
    assert (found.remedy, found.member) == (Kind.REBALANCE, stage.seating().members[1])
    assert measured.measured_s is not None
    assert measured.measured_s < measured.step_s
    assert len(set(stage.seating().loads)) == 2
    assert stage.drive.lost() == {}
    stage.ends_well(reference, nothing_left)
