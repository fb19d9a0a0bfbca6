"""Does `concertina doctor` run every check for real, and end with 0 where one can train and 1 where one cannot?"""

import json
from pathlib import Path

import pytest

from jobs.cli import main

pytestmark = pytest.mark.dist


def doctor(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *words])
    return int(caught.value.code or 0)


def test_this_machine_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor("--storage", str(tmp_path / "runs"), "-o", "json")
    report = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in report["checks"]}
    assert found["gloo"]["status"] == "ok"
    assert "2 processes formed groups" in found["gloo"]["found"]
    assert {"python", "torch", "ray", "mlflow", "hardware", "disk", "shared memory", "open files"} <= set(found)
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")
    assert code == (0 if report["usable"] else 1)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--storage", "/proc/runs") == 1
    text = capsys.readouterr().out
    assert "fail  storage " in text
    assert "-> set storage_path" in text
    assert "check(s) failed: mend them first" in text
    assert "next:" not in text
