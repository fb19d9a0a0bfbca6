"""Do the sources of notices understand what clouds answer, and what they do not? (`infra/metadata.py`)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from concertina.elastic.notices import UNKNOWN_LEAD_S, Source
from infra.fake_metadata import FakeMetadata
from infra.metadata import NoAnswer, NoticeSource, find_sources, this_cloud

pytestmark = pytest.mark.unit
CLOUDS = [Source.AWS, Source.GCP, Source.AZURE]


@pytest.fixture
def fake() -> Iterator[FakeMetadata]:
    server = FakeMetadata()
    yield server
    server.close()


def source_at(fake: FakeMetadata, cloud: Source) -> NoticeSource:
    (found,) = find_sources(cloud.value, fake.endpoint)
    assert found.source is cloud
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_comes_and_goes(fake: FakeMetadata, cloud: Source) -> None:
    """Azure's also speaks of another machine, and of a freeze: neither is meant."""
    source = source_at(fake, cloud)
    assert source.poll() == []
    fake.notice(UNKNOWN_LEAD_S)
    (notice,) = source.poll()
    assert (notice.source, notice.is_hint) == (cloud, False)
    assert UNKNOWN_LEAD_S - 3 < notice.left_s <= UNKNOWN_LEAD_S  # whole seconds, in what clouds answer
    assert source.poll()[0].left_s <= notice.left_s, "its end does not move away while it is asked"
    fake.take_back()
    assert source.poll() == []


def test_a_rebalance_recommendation_is_a_hint_until_there_is_more(fake: FakeMetadata) -> None:
    source = source_at(fake, Source.AWS)
    fake.hint()
    assert [notice.is_hint for notice in source.poll()] == [True]
    fake.notice(120)
    assert [notice.is_hint for notice in source.poll()] == [False]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_answer_is_not_an_answer(fake: FakeMetadata, cloud: Source) -> None:
    source = source_at(fake, cloud)
    fake.notice(30)
    source.poll()
    fake.broken = True
    with pytest.raises(NoAnswer, match="500"):
        source.poll()
    fake.broken = False
    assert len(source.poll()) == 1
    fake.close()
    with pytest.raises(NoAnswer):
        source_at(fake, cloud).poll()


def test_a_service_that_has_forgotten_its_tokens_gives_another(fake: FakeMetadata) -> None:
    source = source_at(fake, Source.AWS)
    source.poll()
    fake.forget_tokens()
    with pytest.raises(NoAnswer, match="401"):
        source.poll()
    assert source.poll() == []


@pytest.mark.parametrize("text", ['{"action": "terminate"}', "<html>", '{"action": "stop", "time": "soon"}'])
def test_what_is_not_understood_is_no_answer(fake: FakeMetadata, text: str) -> None:
    fake.notice(30)
    fake._aws = lambda name: (200, text)  # type: ignore[method-assign]
    with pytest.raises(NoAnswer, match="not understood"):
        source_at(fake, Source.AWS).poll()


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2\n"}, Source.AWS),
        ({"sys_vendor": "Google"}, Source.GCP),
        (
            {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
            Source.AZURE,
        ),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": ""}, None),
        ({"sys_vendor": "LENOVO"}, None),
        ({}, None),
    ],
)
def test_firmware_says_which_cloud_it_is(tmp_path: Path, files: dict[str, str], cloud: Source | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert this_cloud(tmp_path) is cloud


def test_nothing_is_asked_where_nothing_is_wanted() -> None:
    assert find_sources("none") == []
