"""Does `concertina train` refuse in one line, and does a cluster of its own listen only here and leave nothing?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from concertina.state.manifest import list_checkpoints, verify
from infra.keeper_spec import FOLDER_PREFIX
from jobs.cli import main
from tests.actors.drive import ENDLESS, Drive, environment, write_job
from tests.actors.mlflow_copy import MlflowPage
from tests.infra.sockets import beyond_loopback, listening, tree
from tests.waiting import wait_until

Outcome = tuple[int, str, list[str]]
Train = Callable[..., Outcome]

USERS_FILES = [Path.home() / ".ray", Path("/tmp/ray/ray_current_cluster")]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="concertina-train-", dir=os.environ.get("TMPDIR")) as found:
        write_job(Path(found))
        yield Path(found)


@pytest.fixture
def train(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Exit code, stdout and the lines of stderr; in this process, in which Ray must not be initialised."""
    monkeypatch.chdir(folder)

    def inside(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main(["train", *words, "--storage", str(folder / "runs")])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err.strip().splitlines()

    return inside


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "training.stepz=3"], "training.steps"),
        (["--set", "training.steps=many"], "training.steps"),
        (["--set", "data.source=/nowhere/at/all"], "/nowhere/at/all"),
        (["--set", "layout.ep=3"], "layout.ep"),
        (["--set", "layout.cp=3", "--set", "layout.ep=1"], "layout.cp"),
        (["--set", "layout.virtual_stages=2"], "layout.virtual_stages"),
        (
            ["--set", "layout.pp=2", "--set", "layout.ep=1", "--set", "layout.stage_layers=[9, 2]"],
            "layout.stage_layers",
        ),
        (["--set", "layout.tp=3"], "layout.tp"),
        (["--set", "cluster.num_workers=0"], "cluster.num_workers"),
        (
            [
                "--set",
                "cluster.device=cuda",
                "--set",
                "cluster.num_workers=64",
                "--set",
                "training.global_batch_size=64",
            ],
            "wants as many GPUs",
        ),
        (["--set", "tracking.tracking_uri=file:///tmp/mlruns"], "tracking.tracking_uri"),
        (["--set", "data.sequence_length=100000", "--set", "model.max_position_embeddings=100000"], "sequence_length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_starts_nothing(train: Train, words: list[str], told: str) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    code, out, lines = train("tiny.yaml", *words)
    assert (code, out) == (2, "")
    (line,) = [line for line in lines if not line.startswith("preparing data")]
    assert line.startswith("error: ")
    assert told in line
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


@pytest.mark.unit
@pytest.mark.parametrize("words", [["--resume", "nobody"], ["nowhere.yaml"], []])
def test_what_is_not_there_is_one_line(train: Train, words: list[str]) -> None:
    code, out, lines = train(*words)
    assert (code, out, len(lines)) == (102 if "--resume" in words else 2, "", 1)


@pytest.mark.unit
def test_nobody_at_the_address_is_one_line(train: Train) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    code, out, (line,) = train("tiny.yaml", "--address", address)
    assert (code, out) == (102, "")
    assert line.startswith(f"error: no Ray cluster answers at {address}")


# -- a cluster of its own ----------------------------------------------------------------------------------------------


def stamps() -> list[float | None]:
    return [path.stat().st_mtime if path.exists() else None for path in USERS_FILES]


def keeper_of(drive: Drive) -> psutil.Process:
    """The process that owns the driver's cluster."""
    (found,) = [p for p in psutil.Process(drive.process.pid).children() if "infra.keeper" in p.cmdline()]
    return found


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_its_sockets_are_on_loopback_and_a_killed_driver_leaves_nothing(folder: Path) -> None:
    before = stamps()
    words = [str(folder / "tiny.yaml"), "--set", ENDLESS, "--set", "cluster.num_nodes=2"]
    drive = Drive(folder / "killed", words, folder / "runs")
    try:
        drive.reaches(3)
        keeper = keeper_of(drive)
        processes = [psutil.Process(drive.process.pid), *tree(keeper.pid)]
        _listens_on_loopback(drive, processes)
        temporary = Path(keeper.environ()["RAY_AUTH_TOKEN_PATH"]).parent
        assert temporary.name.startswith(FOLDER_PREFIX)
        assert keeper.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
        drive.process.kill()
        drive.process.wait()
        wait_until(lambda: not any(_is_there(process) for process in processes), 60)
    finally:
        drive.clean_up()
    assert not temporary.exists()
    assert stamps() == before, "nothing in the user's own Ray folders"
    assert drive.states()[-1] == "stopped"
    assert MlflowPage(drive.run).status == "KILLED"
    assert verify(list_checkpoints(drive.run.checkpoints)[-1]).step == list(drive.steps())[-1]


def _listens_on_loopback(drive: Drive, processes: list[psutil.Process]) -> None:
    """Ray's, the channel's, the store's and gloo's."""
    found = listening(processes)
    assert beyond_loopback(found) == {}
    journal = drive.journal()
    holders = [int(who.split()[-1]) for who in found.values()]
    # Beside what Ray opens in any worker: the channel and the store here, a device for each gloo group there.
    plain = max(holders.count(pid) for pid in set(holders) - {journal["coordinator_pid"], *journal["pids"].values()})
    assert holders.count(journal["coordinator_pid"]) >= 3, found
    assert all(holders.count(pid) >= 2 for pid in journal["pids"].values()), (found, plain)


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_run_whose_tracking_store_is_down_ends_well(folder: Path) -> None:
    """Nobody listens there: training does not mind, and what was not taken is kept."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    words = [str(folder / "tiny.yaml"), "--set", "training.steps=20", "--set", f"tracking.tracking_uri={uri}"]
    drive = Drive(folder / "untracked", words, folder / "runs")
    try:
        assert drive.ends() == 0, drive.err
    finally:
        drive.clean_up()
    assert list(drive.steps()) == list(range(1, 21))
    show = [sys.executable, "-m", "jobs.cli", "runs", "show", drive.run.run_id, "--storage", str(folder / "runs")]
    told = subprocess.run(show, capture_output=True, text=True, env=environment(), check=True, timeout=60).stdout
    assert "--sync" in told
