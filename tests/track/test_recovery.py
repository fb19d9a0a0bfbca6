"""Are recoveries and members' news told in one line each, and do they survive the event file?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from concertina.layout.fold import Layout
from concertina.track.events import EventLog, EventType, read_events
from concertina.track.recovery import Cause, MemberNews, MemberWhat, short_layout, short_node
from concertina.track.summary import summarize
from tests.track.a_run import LAYOUT, RECOVERY, make_run, start, train

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "recovered in 0.41s from the loss of rank 2 (node killed): world 4 -> 3 dp3 ep1, step 17 kept, 31 MB moved",
        ),
        (
            {"steps_completed": 1, "bytes_moved": 900},
            "recovered in 0.41s from the loss of rank 2 (node killed): world 4 -> 3 dp3 ep1, step 17 completed, "
            "900 B moved",
        ),
        (
            {"cause": Cause("process ended", member=7), "world_before": 3, "layout": {}},
            "recovered in 0.41s from the loss of member 7 (process ended): world 3 -> 3, step 17 kept, 31 MB moved",
        ),
        (
            {"cause": Cause("member 5 joined", member=5), "world_before": 3, "world_after": 4, "layout": LAYOUT},
            "changed over in 0.41s (member 5 joined): world 3 -> 4 dp4 ep2, step 17 kept, 31 MB moved",
        ),
    ],
)
def test_one_line(changes: dict, line: str) -> None:
    assert str(replace(RECOVERY, **changes)) == line


def test_a_layout_names_what_is_not_one() -> None:
    assert short_layout(Layout(16, tp=2, ep=4).degrees) == "dp8 ep4 tp2"
    assert short_layout(Layout(4, pp=2, virtual=3).facts) == "dp2 ep1 pp2x3"
    assert short_layout({}) == ""


def test_recoveries_survive_the_event_file_and_the_newest_ten_are_kept(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 4)
        log.append(EventType.RECOVERY, {"of": "another version"}, step=4)
        for generation in range(1, 13):
            data = {**replace(RECOVERY, generation=generation).to_json(), "of_a_newer_version": 1}
            log.append(EventType.RECOVERY, data, generation=generation, step=4)
    found = summarize(folder)
    assert found.num_recoveries == 13
    assert [recovery.generation for _, recovery in found.recoveries] == list(range(3, 13))
    assert found.recoveries[0][1] == replace(RECOVERY, generation=3)
    assert (found.shape.world, found.shape.layout, found.shape.generation) == (3, RECOVERY.layout, 12)
    assert found.recoveries[-1][0] == [event.ts_ns for event in read_events(folder.events_file)][-1]


def test_members_news() -> None:
    news = MemberNews(5, MemberWhat.READY, "n2", 1234)
    assert str(news) == "member 5 ready on node n2, process 1234"
    assert MemberNews.from_json(news.to_json()) == news
    assert str(MemberNews(5, MemberWhat.LOST, "n2", reason="frozen")) == "member 5 lost on node n2: frozen"
    with pytest.raises(ValueError, match="eaten"):
        MemberNews.from_json({"member": 1, "what": "eaten"})


def test_a_node_has_a_short_name_for_people() -> None:
    node = "8d24f3a1" + 48 * "c"
    assert short_node(node) == "8d24f3a1"
    assert short_node("a-machine-with-a-long-name") == "a-machine-with-a-long-name"
    assert str(MemberNews(3, MemberWhat.READY, node)) == "member 3 ready on node 8d24f3a1"
    assert MemberNews(3, MemberWhat.READY, node).to_json()["node"] == node, "events keep it whole"
