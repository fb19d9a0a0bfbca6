"""Can two processes of this machine communicate? `python -m jobs.gloo_selftest` starts both and prints one line.

They form their groups as the ranks of a run do, on 127.0.0.1; the store is a file, so nothing listens but gloo.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

WORLD = 2
TIMEOUT = timedelta(seconds=20)


def main(arguments: list[str]) -> int:
    """Without arguments: start both ranks. With `RANK FILE`: be one of them."""
    if arguments:
        return _rank(int(arguments[0]), arguments[1])
    with tempfile.TemporaryDirectory(prefix="concertina-doctor-") as folder:
        store = str(Path(folder) / "store")
        ranks = [
            subprocess.Popen([sys.executable, "-m", "jobs.gloo_selftest", str(rank), store]) for rank in range(WORLD)
        ]
        try:
            codes = [process.wait(TIMEOUT.total_seconds() * 2) for process in ranks]
        except subprocess.TimeoutExpired:
            print(f"a process did not end within {TIMEOUT.total_seconds() * 2:.0f} s", file=sys.stderr)
            return 1
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    return max(abs(code) for code in codes)


def _rank(rank: int, file: str) -> int:
    import torch
    import torch.distributed as dist

    from concertina.layout import Layout
    from concertina.parallel.groups import GroupOptions, form_groups

    started = time.monotonic()
    groups = form_groups(Layout(WORLD), rank, dist.FileStore(file, WORLD), GroupOptions(timeout=TIMEOUT))
    value = torch.ones(1) * (rank + 1)
    groups.world.backend.allreduce([value]).wait()
    if value.item() != sum(range(1, WORLD + 1)):
        print(f"all-reduce gave {value.item()}, not 3", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"{WORLD} processes formed groups and reduced over 127.0.0.1 in {time.monotonic() - started:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
