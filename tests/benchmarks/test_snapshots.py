"""Do all three ways run, and does each say what it waited, what it updated and how much it keeps?"""

from __future__ import annotations

import pytest

from benchmarks.snapshots import NOBODY, SECOND_OWNERS, WAYS, WHOLE_STATE, measure
from tests.train.worlds import tiny_job


@pytest.mark.soak
def test_every_way_has_a_sample_a_round() -> None:
    (found,) = measure({"tiny": tiny_job()}, rounds=2).values()
    for way in WAYS:
        assert len(found[way]) == 2
        assert all(seconds > 0 for seconds in found[way])
    assert found[f"{NOBODY}: waited"] == [0.0, 0.0]
    assert all(seconds > 0 for seconds in found[f"{SECOND_OWNERS}: waited"])
    assert min(found[f"{SECOND_OWNERS}: updating"]) > max(found[f"{NOBODY}: updating"])
    assert all(seconds > 0 for seconds in found[f"{WHOLE_STATE}: waited"])
    assert found[f"{WHOLE_STATE}: bytes"][0] == 3 * found[f"{SECOND_OWNERS}: bytes"][0], "and the moments"
