"""Do events survive kills, torn lines, many threads and odd numbers, each exactly once and in order?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from concertina.errors import ConcertinaError
from concertina.track.events import EventLog, EventType, last_event, read_events
from concertina.track.owner import Busy

pytestmark = pytest.mark.unit

NO_WAIT = timedelta(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_a_line_has_the_documented_fields(path: Path) -> None:
    with EventLog(path, "quick-abc") as log:
        log.append(EventType.STEP, {"loss": 1.5}, generation=2, step=7)
    doc = json.loads(path.read_text())
    assert list(doc) == ["v", "ts_ns", "run_id", "seq", "type", "generation", "step", "data"]
    assert (doc["v"], doc["run_id"], doc["seq"], doc["type"]) == (1, "quick-abc", 0, "step")
    assert (doc["generation"], doc["step"], doc["data"]) == (2, 7, {"loss": 1.5})


def test_seq_goes_on_across_writers(path: Path) -> None:
    for session in range(3):
        with EventLog(path, "r") as log:
            assert [log.append("state"), log.append("state")] == [2 * session, 2 * session + 1]
    assert [event.seq for event in read_events(path)] == list(range(6))


@pytest.mark.parametrize("tail", [b'{"v":1,"ts', b"\0" * 5000, b"x" * 200_000])
def test_a_torn_last_line_is_cut_off(path: Path, tail: bytes) -> None:
    with EventLog(path, "r") as log:
        log.append("state", {"n": 0})
    with path.open("ab") as file:
        file.write(tail)
    assert [event.data["n"] for event in read_events(path)] == [0]
    with EventLog(path, "r") as log:
        assert log.append("state", {"n": 1}) == 1
    assert [event.data["n"] for event in read_events(path)] == [0, 1]
    assert path.read_bytes().count(b"\n") == 2


def test_a_file_that_is_only_torn_starts_anew(path: Path) -> None:
    path.write_bytes(b'{"v":1')
    with EventLog(path, "r") as log:
        assert log.append("state") == 0


def test_a_damaged_line_in_the_middle_is_passed_over(path: Path) -> None:
    with EventLog(path, "r") as log:
        log.append("state")
    with path.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n{}\n")
    assert last_event(path).seq == 0  # type: ignore[union-attr]
    with EventLog(path, "r") as log:
        assert log.append("state") == 1
    assert [event.seq for event in read_events(path)] == [0, 1]


def test_fields_and_types_of_tomorrow_are_read(path: Path) -> None:
    line = {"v": 9, "ts_ns": 1, "run_id": "r", "seq": 3, "type": "aurora", "cause": "sun", "data": {"a": 1}}
    path.write_text(json.dumps(line) + "\n")
    (event,) = read_events(path)
    assert (event.v, event.type, event.step, event.generation) == (9, "aurora", None, 0)


def test_a_reader_follows_by_offset(path: Path) -> None:
    seen: list[int] = []
    offset = 0
    with EventLog(path, "r") as log:
        for n in range(5):
            log.append("state", {"n": n})
            for event in read_events(path, offset):
                seen.append(event.data["n"])
                offset = event.end_offset
    assert seen == list(range(5))
    assert offset == path.stat().st_size


def test_last_event_knows_its_place(path: Path) -> None:
    with EventLog(path, "r") as log:
        for n in range(400):
            log.append("state", {"text": "x" * 1000, "n": n})
    with path.open("ab") as file:
        file.write(b"\0\n torn")
    event = last_event(path)
    assert event is not None
    assert event.data["n"] == 399
    assert event.end_offset == list(read_events(path))[-1].end_offset
    with EventLog(path, "r") as log:
        log.append("big", {"text": "y" * 300_000})
    assert last_event(path).type == "big"  # type: ignore[union-attr]


def test_no_file_means_no_events(path: Path) -> None:
    assert list(read_events(path)) == []
    assert last_event(path) is None


def test_odd_numbers_come_back(path: Path) -> None:
    with EventLog(path, "r") as log:
        log.append("step", {"loss": float("nan"), "grad_norm": float("inf"), "deep": [{"x": float("-inf")}]})
        log.append("step", {"loss": np.float32(0.5), "tokens": np.int64(3), "path": path})
    odd, plain = read_events(path)
    assert np.isnan(float(odd.data["loss"]))
    assert float(odd.data["grad_norm"]) == float("inf")
    assert float(odd.data["deep"][0]["x"]) == float("-inf")
    assert plain.data == {"loss": 0.5, "tokens": 3, "path": str(path)}
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_what_is_not_json_is_refused_and_leaves_no_trace(path: Path) -> None:
    with EventLog(path, "r") as log:
        with pytest.raises(TypeError, match="cannot stand in an event"):
            log.append("state", {"thing": object()})
        assert log.append("state") == 0


def test_many_threads_lose_nothing(path: Path) -> None:
    with EventLog(path, "r") as log:
        threads = [
            threading.Thread(target=lambda: [log.append("state", {"t": 1}) for _ in range(250)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event.seq for event in read_events(path)] == list(range(2000))


def test_appends_touch_the_disk_once_each_and_wait_for_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency bounded in count: one write(2) a line, no fsync."""
    writes: list[int] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(len(data)), real(fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("an append must not wait for the disk"))
    with EventLog(path, "r") as log:
        for step in range(100):
            log.append("step", {"loss": 1.0}, step=step)
    assert len(writes) == 100


def test_a_second_writer_is_refused_and_told_who_has_it(path: Path) -> None:
    with (
        EventLog(path, "quick-abc"),
        pytest.raises(Busy, match=f"quick-abc is still being run by process {os.getpid()}"),
    ):
        EventLog(path, "quick-abc", wait=NO_WAIT)
    EventLog(path, "quick-abc", wait=NO_WAIT).close()


def test_a_full_disk_is_one_clear_error_and_no_half_line(path: Path) -> None:
    """The limit on file size stands in for the disk: write(2) takes a part, then refuses."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from concertina.errors import ConcertinaError\n"
        "from concertina.track.events import EventLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = EventLog(Path(sys.argv[1]), 'r'); log.append('state', {'n': 0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))\n"
        "for n in (1, 2):\n"
        "    try: log.append('state', {'text': 'x' * 500}); sys.exit('taken')\n"
        "    except ConcertinaError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.append('state', {'n': 3})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot append") == 2
    assert [(event.seq, event.data["n"]) for event in read_events(path)] == [(0, 0), (1, 3)]


def test_a_writer_killed_while_appending_leaves_a_readable_file(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from concertina.track.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]), 'r'); print('up', flush=True)\n"
        "while True: log.append('step', {'text': 'x' * 300}, step=1)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        before = path.stat().st_size
        for _ in range(100_000):
            if path.stat().st_size > before + 20_000:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    seqs = [event.seq for event in read_events(path)]
    assert seqs == list(range(len(seqs)))
    assert len(seqs) > 100


def test_a_missing_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        EventLog(tmp_path / "gone" / "events.jsonl", "r")
    assert issubclass(Busy, ConcertinaError)
