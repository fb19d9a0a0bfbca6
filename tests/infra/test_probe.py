"""Is a node that answers told from one that does not, and from one where nobody listens? (`infra/probe.py`)"""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from infra.lab.network import Network, why_not
from infra.probe import unreached


@pytest.mark.unit
def test_who_answers_and_who_refuses_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as closed:
        port, refused = listener.getsockname()[1], closed.getsockname()[1]
        closed.close()
        assert unreached({"a": ("127.0.0.1", port), "b": ("127.0.0.1", refused)}) == []
    assert unreached({}) == []


@pytest.mark.skipif(bool(why_not()), reason=f"no links here: {why_not()}")
@pytest.mark.parametrize("way", [(0, 1), (1, 0)])
def test_a_link_that_is_cut_either_way_is_seen(way: tuple[int, int]) -> None:
    network = Network(f"probe{way[0]}", 2)
    network.up()
    try:
        network.lose(*way)
        program = f"from infra.probe import unreached; print(unreached({{'b': ('{network.address(1)}', 9)}}))"
        command = network.inside(0, [sys.executable, "-c", program])
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "['b']"
        network.carry(*way)
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    finally:
        network.down()
