"""Does a loss say why a member is gone, and which reasons would hit the next member as well?"""

from __future__ import annotations

import pytest

from concertina.elastic.losses import Loss, Reason

pytestmark = pytest.mark.unit


def test_it_is_one_line_for_people() -> None:
    loss = Loss(3, "8d24f3", Reason.FROZEN, "silent for 2.5 s, at step 12, step")
    assert str(loss) == "member 3 (frozen: silent for 2.5 s, at step 12, step)"
    assert "\n" not in str(loss)


@pytest.mark.parametrize("reason", Reason)
def test_only_what_another_member_would_meet_as_well_ends_the_run(reason: Reason) -> None:
    assert reason.ends_the_run == (reason in (Reason.USER_ERROR, Reason.RAISED))


def test_reasons_are_words_that_a_file_keeps() -> None:
    assert [Reason(reason.value) for reason in Reason] == list(Reason)
    assert all(reason.value == reason.name.lower() for reason in Reason)
