"""How is it told where a run's time and money went, and what its recoveries were?"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from concertina.elastic.account import Account, Bucket
from concertina.track.recovery import PHASES, Recovery, short_node
from concertina.track.summary import RunSummary

__all__ = ["goodput_line", "ledger_facts", "ledger_lines", "recovery_facts", "recovery_lines"]


def ledger_facts(summary: RunSummary) -> dict[str, Any] | None:
    """For programs. Seconds are those of members: four ranks for a minute are 240."""
    account = summary.ledger
    if account is None:
        return None
    usd = account.usd_by_bucket
    return {
        "total_s": account.total_s,
        "goodput": account.goodput,
        "missing_s": account.missing_s,
        "members": account.members,
        "imbalance": account.imbalance,
        "balanced": account.is_balanced,
        "usd": account.usd,
        "tokens_per_usd": summary.tokens_per_usd,
        "steps_per_usd": summary.steps_per_usd,
        "buckets": {
            bucket.value: {
                "seconds": account.of(bucket),
                "share": account.share(bucket),
                "usd": None if usd is None else usd.get(bucket, 0.0),
            }
            for bucket in Bucket
        },
    }


def ledger_lines(summary: RunSummary) -> Iterator[str]:
    """A table of the buckets that hold anything, after one line that says it all."""
    account = summary.ledger
    if account is None:
        return
    yield f"  {'goodput':<12} {goodput_line(summary)}"
    label = "ledger"
    for bucket in Bucket:
        if account.of(bucket) > 0:
            usd = "" if account.usd_by_bucket is None else f"  ${account.usd_by_bucket.get(bucket, 0.0):.4f}"
            yield f"  {label:<12} {bucket:<22} {account.of(bucket):>12,.1f} s {account.share(bucket):>7.2%}{usd}"
            label = ""
    if account.missing_s > 0:
        yield f"  {label:<12} {'(ranks missing)':<22} {account.missing_s:>12,.1f} s"
    if not account.is_balanced:
        off, unexplained = f"{account.imbalance:+.2%}", f"{account.share(Bucket.OTHER):.2%} of it is unexplained"
        yield f"  {label:<12} the buckets miss the wall clock by {off}, {unexplained}: do not trust them"


def goodput_line(summary: RunSummary) -> str:
    """`0.931 of 480 member-seconds; $0.0133, 3.4M tokens and 42,000 steps a dollar`."""
    account = summary.ledger
    if account is None:
        return "not recorded"
    money = ""
    if account.usd is not None:
        money = f"; ${account.usd:.4f}"
        if summary.tokens_per_usd and summary.steps_per_usd:
            money += f", {summary.tokens_per_usd:,.0f} tokens and {summary.steps_per_usd:,.0f} steps a dollar"
    return f"{account.goodput:.3f} of {account.total_s:,.0f} member-seconds{_most_of_the_rest(account)}{money}"


def _most_of_the_rest(account: Account) -> str:
    """`, most of the rest starting (0.042)`."""
    rest = [bucket for bucket in Bucket if bucket is not Bucket.PRODUCTIVE and account.of(bucket) > 0]
    if not rest:
        return ""
    most = max(rest, key=account.of)
    return f", most of the rest {most} ({account.share(most):.3f})"


def recovery_facts(summary: RunSummary) -> list[dict[str, Any]]:
    return [{"ts_ns": ts_ns, **recovery.to_json()} for ts_ns, recovery in summary.recoveries]


def recovery_lines(summary: RunSummary) -> Iterator[str]:
    """The newest, oldest of them first: when, what, and which phase took how long."""
    more = summary.num_recoveries - len(summary.recoveries)
    label = "recoveries"
    if more:
        yield f"  {label:<12} {summary.num_recoveries}, the newest {len(summary.recoveries)}:"
        label = ""
    for ts_ns, recovery in summary.recoveries:
        time = datetime.fromtimestamp(ts_ns / 1e9).strftime("%H:%M:%S")
        yield f"  {label:<12} {time}  generation {recovery.generation}: {recovery}"
        yield f"  {'':<12} {'':<8}  {_phases(recovery)}"
        label = ""


def _phases(recovery: Recovery) -> str:
    told = [f"detected {recovery.detected_s:.2f}s"]
    told += [f"{name.removesuffix('_s')} {recovery.phases[name]:.2f}s" for name in PHASES if name in recovery.phases]
    where = f", on {short_node(recovery.cause.node)}" if recovery.cause.node else ""
    return ", ".join(told) + where
