"""Does the ledger reach events, summaries and MLflow, over sessions, restarts and steps done again?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from concertina.elastic.account import Account, Bucket
from concertina.elastic.ledger import Ledger, Price
from concertina.track.events import EventLog, EventType, read_events
from concertina.track.ledger import LEDGER_EVERY_S, LedgerWriter
from concertina.track.mlflow_copy import Copier
from concertina.track.run import RunFolder
from concertina.track.summary import summarize
from tests.track.a_run import end, make_run, rows, start, step_data, the_run, train

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def account(productive_s: float, starting_s: float = 0.0, **other: float) -> Account:
    seconds = {Bucket.PRODUCTIVE: productive_s, Bucket.STARTING: starting_s}
    seconds |= {Bucket(name): value for name, value in other.items()}
    return Account(seconds, sum(seconds.values()))


def write(log: EventLog, found: Account, step: int, usd_per_rank_hour: float | None = None) -> None:
    log.append(EventType.LEDGER, found.priced(usd_per_rank_hour).to_json(), step=step)


def ledger_of(folder: RunFolder) -> Account:
    found = summarize(folder).ledger
    assert found is not None
    return found


def test_the_writer_writes_now_and_then_and_when_asked(tmp_path: Path) -> None:
    folder, clock = make_run(tmp_path), Clock()
    ledger = Ledger(0, wanted=2, price=Price(7.2, 2))
    with EventLog(folder.events_file, folder.run_id) as log:
        writer = LedgerWriter(log, ledger, clock)
        for member in range(2):
            ledger.born(member, 0, "a")
        for second in range(1, 101):
            clock.now = second
            for member in range(2):
                ledger.report(member, second, {"starting": 1, "productive": second - 1}, Bucket.PRODUCTIVE)
            if second == 40:
                writer.write(generation=2, step=4)
            writer.look(generation=3, step=second // 10)
    events = list(read_events(folder.events_file))
    assert [event.data["total_s"] / 2 for event in events] == [LEDGER_EVERY_S, 40, 70, 100]
    assert [(event.generation, event.step) for event in events] == [(3, 3), (2, 4), (3, 7), (3, 10)]
    assert events[-1].data == {
        "seconds": {"productive": 198, "starting": 2},
        "total_s": 200,
        "goodput": 0.99,
        "missing_s": 0,
        "members": 2,
        "usd": pytest.approx(0.2),
    }
    assert ledger_of(folder).of(Bucket.PRODUCTIVE) == 198


def test_a_run_without_a_ledger_has_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        log.append(EventType.LEDGER, {"of": "another version"})
    assert summarize(folder).ledger is None
    assert summarize(folder).tokens_per_usd is None


def test_sessions_add_up_and_the_newest_of_each_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 10)
        write(log, account(30, 5), 5, 3.6)
        write(log, account(60, 5), 10, 3.6)
        end(log, "stopped")
        start(log, resumed_from_step=10)
        train(log, 11, 20)
        write(log, account(80, 15), 20, 7.2)
        end(log)
    summary = summarize(folder)
    found = ledger_of(folder)
    assert (found.of(Bucket.PRODUCTIVE), found.of(Bucket.STARTING), found.total_s) == (140, 20, 160)
    assert found.goodput == 140 / 160
    assert found.usd == pytest.approx((65 * 3.6 + 95 * 7.2) / 3600)
    assert summary.tokens_per_usd == pytest.approx(2000 / found.usd)
    assert summary.steps_per_usd == pytest.approx(20 / found.usd)


def test_steps_a_resume_does_again_were_not_productive(tmp_path: Path) -> None:
    """Three sessions; the third goes back before the second one's beginning."""
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 10)
        write(log, account(100, 5, exposed_communication=20), 10)
        start(log, resumed_from_step=8)
        train(log, 9, 12)
        write(log, account(40, 5), 12)
        start(log, resumed_from_step=5)
        train(log, 6, 12)
        write(log, account(70, 5), 12)
    found = ledger_of(folder)
    assert found.of(Bucket.PRODUCTIVE) == pytest.approx(50 + 0 + 70)
    assert found.of(Bucket.EXPOSED_COMMUNICATION) == pytest.approx(10)
    assert found.of(Bucket.RECOMPUTATION) == pytest.approx(50 + 10 + 40)
    assert sum(found.seconds.values()) == pytest.approx(found.total_s) == 245


def test_a_roll_back_inside_a_session_is_in_the_members_books_already(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 10)
        log.append(EventType.ROLLBACK, {"to_step": 5}, step=10)
        train(log, 6, 7)
        write(log, account(70, recomputation=50), 7)
        assert ledger_of(folder).of(Bucket.RECOMPUTATION) == 50
        start(log, resumed_from_step=0)
    # All seven steps that stood are void now, and with them all that was productive.
    assert ledger_of(folder).of(Bucket.RECOMPUTATION) == pytest.approx(120)


def test_books_that_began_anew_inside_a_session_add_up_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        write(log, account(60, 5), 5)
        write(log, account(10, 0), 6)
        write(log, account(30, 0), 9)
    assert ledger_of(folder).total_s == 95


# -- MLflow ----------------------------------------------------------------------------------------------------------


def copied(folder: RunFolder) -> tuple[MlflowClient, Any]:
    uri = f"sqlite:///{folder.storage / 'mlflow.db'}"
    Copier(folder, uri, "trials").copy(lambda: False)
    client = MlflowClient(tracking_uri=uri)
    return client, the_run(client, folder)


def test_mlflow_gets_every_ledger_and_the_last_one_last(storage: Path) -> None:
    """Two at the same step: the end of a session comes with the step of the one before."""
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 4)
        write(log, account(30, 10), 4, 3.6)
    copied(folder)
    with EventLog(folder.events_file, folder.run_id) as log:
        write(log, account(35, 10, draining=5), 4, 3.6)
        end(log, "stopped")
        start(log, resumed_from_step=2)
        log.append(EventType.STEP, step_data(3), step=3)
        write(log, account(15, 5), 3, 3.6)
    client, run = copied(folder)
    found = rows(client, run.info.run_id)
    # Half of the first session's steps were done again.
    assert found["goodput", 4] == pytest.approx([30 / 40, 35 / 50, (17.5 + 15) / 70])
    assert found["ledger/starting_s", 4] == [10, 10, 15]
    assert found["ledger/draining_s", 4] == [5, 5]
    assert found["usd", 4] == pytest.approx([0.04, 0.05, 0.07])
    assert run.data.metrics["goodput"] == pytest.approx((17.5 + 15) / 70)
    assert run.data.metrics["ledger/recomputation_s"] == pytest.approx(17.5)
    assert found["train/loss", 4] == [4.0]


def test_a_kill_before_the_offset_is_saved_doubles_no_row(storage: Path) -> None:
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 4)
        write(log, account(30, 10), 4)
        write(log, account(35, 10), 4)
    copied(folder)
    # As if nothing had been written down of what was sent.
    saved = folder.mlflow_file.read_text()
    offset = saved.index('"offset": ') + len('"offset": ')
    folder.mlflow_file.write_text(saved[:offset] + "0" + saved[saved.index(",", offset) :])
    with EventLog(folder.events_file, folder.run_id) as log:
        write(log, account(40, 10), 4)
    client, run = copied(folder)
    found = rows(client, run.info.run_id)
    assert found["goodput", 4] == pytest.approx([0.75, 35 / 45, 0.8])
    assert all(len(values) == 1 for (key, _), values in found.items() if key.startswith("train/"))


def test_the_ledger_measures_no_checkpoint(storage: Path) -> None:
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 6)
        write(log, account(30, 10), 6)
        log.append(EventType.CHECKPOINT, {"bytes": 10}, step=6)
        write(log, account(31, 10), 6)
    client, run = copied(folder)
    models = client.search_logged_models([run.info.experiment_id])
    assert {metric.key for model in models for metric in model.metrics or ()} <= {"train/loss", "validation/loss"}
