"""What runs on a host of the lab? One Ray node, started again when it ends, as a machine's supervisor does it.

`python -m infra.lab.host -- ray start ...`: the first start of all that follow. Everything below it ends with it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import FrameType

from infra.processes import adopt_orphans, end_descendants

__all__ = ["HAS_ENDED", "main"]

HAS_ENDED = "the node has ended with"
_AGAIN_S = 1.0
_END_BOUND = timedelta(seconds=5)


def main(command: list[str]) -> int:
    """Until SIGTERM, which is passed on to Ray: it drains its node first."""
    adopt_orphans()
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if node is not None:
            node.send_signal(number)

    node: subprocess.Popen[bytes] | None = None
    signal.signal(signal.SIGTERM, pass_on)
    while not asked:
        node = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if asked:  # meanwhile
            node.send_signal(asked[0])
        print(f"started {node.pid}", flush=True)
        print(f"{HAS_ENDED} {node.wait()}", flush=True)
        end_descendants(_END_BOUND)
        time.sleep(0 if asked else _AGAIN_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
