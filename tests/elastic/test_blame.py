"""Which of many failing ranks broke the run? The first with a reason of its own, else one that died in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.blame import find_blame
from concertina.elastic.messages import RankError

pytestmark = pytest.mark.unit


def error(rank: int, secondary: bool = False, exit_code: int = 1, message: str = "boom") -> RankError:
    return RankError(rank, "ValueError", message, f"Traceback of rank {rank}", exit_code, secondary)


broken = st.builds(error, st.integers(0, 7), st.booleans(), st.sampled_from([1, 2, 105]))
vanished = st.dictionaries(st.integers(0, 7), st.sampled_from(["its connection broke", "killed for memory"]))


def test_nothing_has_happened() -> None:
    assert find_blame([], {}) is None


@given(errors=st.lists(broken), lost=vanished)
def test_the_order_of_suspicion(errors: list[RankError], lost: dict[int, str]) -> None:
    blame = find_blame(errors, lost)
    own = [e for e in errors if not e.secondary]
    silent = set(lost) - {e.rank for e in errors}
    if own:
        assert blame is not None
        assert (blame.rank, blame.traceback) == (own[0].rank, own[0].traceback)
        assert blame.reason in ("raised", "user_error")
    elif silent:
        assert blame is not None
        assert blame.rank == min(silent)
        assert blame.reason in ("killed", "out_of_memory")
    elif errors:
        assert blame is not None
        assert (blame.rank, blame.reason) == (errors[0].rank, "lost")
    else:
        assert blame is None


def test_the_first_that_raised_is_to_blame_though_others_lost_it_first() -> None:
    errors = [error(0, secondary=True), error(3), error(1)]
    blame = find_blame(errors, {2: "its connection broke"})
    assert blame is not None
    assert (blame.rank, blame.reason, blame.traceback) == (3, "raised", "Traceback of rank 3")
    assert str(blame) == "rank 3 raised ValueError: boom"


def test_a_users_mistake_is_one() -> None:
    blame = find_blame([error(1, exit_code=2, message="no such file")], {})
    assert blame is not None
    assert blame.reason == "user_error"


def test_a_rank_that_was_killed_comes_before_those_that_lost_it() -> None:
    blame = find_blame([error(0, secondary=True), error(1, secondary=True)], {2: "its process ended", 0: "gone"})
    assert blame is not None
    assert (blame.rank, blame.reason) == (2, "killed")
    assert str(blame) == "rank 2 died: its process ended"


def test_a_rank_that_spoke_and_then_vanished_is_judged_by_what_it_said() -> None:
    blame = find_blame([error(1, secondary=True)], {1: "its process ended"})
    assert blame is not None
    assert (blame.rank, blame.reason) == (1, "lost")
    assert str(blame) == "rank 1 lost its peers: boom"


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("killed for memory (connection reset)", "out_of_memory"),
        ("its process was killed (SIGKILL, out of memory, or a crash) (connection reset)", "killed"),
        ("its process does not answer", "killed"),
        ("froze: silent for 30 s", "frozen"),
    ],
)
def test_out_of_memory_only_where_that_is_known(why: str, reason: str) -> None:
    blame = find_blame([], {0: why})
    assert blame is not None
    assert blame.reason == reason
