"""Does a keeper's task survive the way through a command line, and is each device dealt to one node?"""

from __future__ import annotations

import pytest

from infra.keeper_spec import KeeperReport, KeeperSpec

pytestmark = pytest.mark.unit


def spec(num_nodes: int, gpus: tuple[int, ...]) -> KeeperSpec:
    return KeeperSpec("/tmp/x", num_nodes, 2, gpus, ({"a": 1.0},) * num_nodes, False, 1, 2.5, 60.0, 45.0)


def test_round_trip() -> None:
    task = spec(2, (0, 1))
    assert KeeperSpec.from_json(task.to_json()) == task
    report = KeeperReport("127.0.0.1:1", "/tmp/x/session", None, 3, 4.5)
    assert KeeperReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(("num_nodes", "gpus"), [(2, (0, 1, 2, 3)), (3, (4, 5)), (2, (0,)), (4, ())])
def test_each_device_has_one_node(num_nodes: int, gpus: tuple[int, ...]) -> None:
    task = spec(num_nodes, gpus)
    shares = [task.gpus_of(index) for index in range(num_nodes)]
    assert sum(shares, ()) == gpus
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_nodes_without_devices_see_none() -> None:
    assert [spec(2, (7,)).environment_of(i) for i in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    assert spec(2, ()).environment_of(0) == {}
