"""Is a run that cannot be broken, or not so, refused in one line, before anything is joined?"""

from __future__ import annotations

from pathlib import Path

import pytest

from concertina.config import Job
from concertina.track.run import create_run
from jobs.cli import main

pytestmark = pytest.mark.unit


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """One run that nobody runs."""
    create_run(tmp_path, Job(name="quiet"))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["kill", "--rank", "1"], 102, "does not run: start it with `concertina train`"),
        (["kill"], 2, "whom? rank=N"),
        (["eat", "--rank", "1"], 2, "begins with kill"),
        (["freeze", "--node", "1"], 2, "a frozen node hears no thaw"),
        (["kill", "--coordinator", "--at-phase", "moving"], 2, "phases of the run only"),
        (["kill", "--rank", "1", "--member", "2"], 2, "one victim a line"),
    ],
)
def test_refusals(words: list[str], code: int, problem: str, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chaos", "latest", *words, "--storage", str(storage)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == code
    assert line.startswith("error: ")
    assert problem in line


def test_a_line_of_train_is_refused_before_anything_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", "--chaos", "kill everybody", "--storage", str(tmp_path / "runs")])
    assert ended.value.code == 2
    assert "'everybody' is none of" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
