"""A member computes three times slower than the others: is it found, and does less to do make steps shorter?"""

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
