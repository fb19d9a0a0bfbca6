"""Do accounts add up, survive JSON, and say when they do not add up?"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.account import Account, Bucket

pytestmark = pytest.mark.unit

ACCOUNTS = st.builds(
    lambda seconds, missing_s, usd: Account(seconds, sum(seconds.values()), missing_s, None, 2).priced(usd),
    st.dictionaries(st.sampled_from(Bucket), st.integers(1, 10**6).map(float), max_size=5),
    st.integers(0, 9).map(float),
    st.sampled_from([None, 0.5, 4.0]),
)


@given(ACCOUNTS)
def test_an_account_survives_json(account: Account) -> None:
    again = Account.from_json(json.loads(json.dumps(account.to_json())))
    assert (again.seconds, again.total_s, again.missing_s) == (account.seconds, account.total_s, account.missing_s)
    assert again.usd == pytest.approx(account.usd)
    if account.usd_by_bucket is not None:
        assert again.usd_by_bucket == pytest.approx(account.usd_by_bucket)


@given(ACCOUNTS, ACCOUNTS)
def test_sessions_add_up(one: Account, two: Account) -> None:
    both = one + two
    assert all(both.of(bucket) == one.of(bucket) + two.of(bucket) for bucket in Bucket)
    assert both.total_s == one.total_s + two.total_s
    assert both.missing_s == one.missing_s + two.missing_s
    if one.usd is not None and two.usd is not None:
        assert both.usd == pytest.approx(one.usd + two.usd)
    elif one.total_s and two.total_s:
        assert both.usd is None
    assert one + Account() == one


@given(ACCOUNTS, st.floats(0, 1))
def test_voiding_moves_and_loses_nothing(account: Account, share: float) -> None:
    after = account.with_voided(share)
    assert sum(after.seconds.values()) == pytest.approx(sum(account.seconds.values()))
    assert after.usd == pytest.approx(account.usd)
    assert after.of(Bucket.PRODUCTIVE) == pytest.approx(account.of(Bucket.PRODUCTIVE) * (1 - share))
    assert after.of(Bucket.STARTING) == account.of(Bucket.STARTING)


def test_a_bucket_of_a_newer_version_is_other() -> None:
    account = Account.from_json({"seconds": {"dreaming": 3, "other": 1, "productive": 6}, "total_s": 10})
    assert account.seconds == {Bucket.OTHER: 4, Bucket.PRODUCTIVE: 6}
    assert account.usd is None
    with pytest.raises(KeyError):
        Account.from_json({"total_s": 1})


@pytest.mark.parametrize(
    ("seconds", "total_s", "balanced"),
    [
        ({Bucket.PRODUCTIVE: 99.5}, 100, True),
        ({Bucket.PRODUCTIVE: 98.5}, 100, False),
        ({Bucket.PRODUCTIVE: 101.5}, 100, False),
        ({Bucket.PRODUCTIVE: 99.2, Bucket.OTHER: 0.8}, 100, True),
        ({Bucket.PRODUCTIVE: 98, Bucket.OTHER: 2}, 100, False),
        ({}, 0, True),
    ],
)
def test_what_balances(seconds: dict[Bucket, float], total_s: float, balanced: bool) -> None:
    assert Account(seconds, total_s).is_balanced is balanced


def test_goodput_is_of_the_wall_clock_not_of_the_sum() -> None:
    assert Account({Bucket.PRODUCTIVE: 50, Bucket.STARTING: 30}, 100).goodput == 0.5
    assert Account().goodput == 0
