"""Does a folder appear whole or not at all, and is there room for it?"""

from __future__ import annotations

from pathlib import Path

import pytest

from concertina.errors import ConcertinaError, UserError
from concertina.hf.draft import check_place, check_room, draft_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("there", [False, True])
def test_it_appears_at_the_end(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "below" / "out"
    if there:
        target.mkdir(parents=True)
    with draft_of(target) as draft:
        (draft / "file").write_text("x")
        assert not (target / "file").exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_what_a_kill_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    found: list[Path] = []

    def fails() -> None:
        with draft_of(tmp_path / "out") as draft:
            found.extend(draft.iterdir())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert found == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is there already and not empty: remove it"):
            check_place(target)


def test_room(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(ConcertinaError, match=rf"1000000000\.0 GB are to be written below {tmp_path}, .* GB are free"):
        check_room(tmp_path / "out", 10**18)
