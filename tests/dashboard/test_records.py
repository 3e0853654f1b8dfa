"""A ledger that is followed: what is shown was verified, and what no longer verifies is said at once or soon."""

import sqlite3
import threading

import pytest
from made_runs import tamper

from common.ledger import Draft, Ledger
from server.dashboard.records import AT_ONCE, Records


def settle(records: Records) -> Records:
    records.step()
    while records.is_behind:
        records.step()
    return records


@pytest.fixture
def records(two_runs, coordinator):
    made = settle(
        Records(str(coordinator.home / "ledger.sqlite"), threading.RLock(), recheck_s=100.0, clock=lambda: 0.0)
    )
    yield made
    made.close()


def test_everything_is_read_once_and_then_what_is_new(two_runs, coordinator, records):
    run, _ = two_runs
    lines = len(list(coordinator.ledger.entries()))
    assert (records.folded.seq, records.folded.head) == (lines, coordinator.ledger.head())
    assert records.complete
    assert not records.problem
    assert records.step() is False
    run.round(3)
    assert records.step() is True
    assert records.folded.seq == len(list(coordinator.ledger.entries())) > lines


def test_the_fold_is_the_accountants_own(coordinator, records):
    theirs = coordinator.accountant._book
    ours = records.folded.book
    assert ours.runs.keys() == theirs.runs.keys()
    for run_id, accounts in theirs.runs.items():
        for name, account in accounts.items():
            assert ours.runs[run_id][name].events() == account.events()
            assert [vars(held) for held in ours.runs[run_id][name].held] == [vars(held) for held in account.held]


def test_refusals_keep_their_reason_and_rounds_their_times(two_runs, records):
    assert list(records.folded.refusals.values()) == ["policy"]
    first, last = records.folded.moments["a" * 16, 1]
    assert 0 < first <= last


@pytest.mark.parametrize("column", ["body", "kind", "time_us", "salt", "hash", "previous"])
def test_a_changed_line_is_found_on_first_reading(two_runs, coordinator, column):
    path = coordinator.home / "ledger.sqlite"
    value = "12345" if column == "time_us" else "'" + "e" * 64 + "'"
    tamper(path, f"UPDATE ledger_entries SET {column} = {value} WHERE seq = 3")
    records = settle(Records(str(path), threading.RLock()))
    assert "line 3" in records.problem
    assert records.folded.seq == 2  # what stands before it is sound


def test_a_ledger_that_loses_its_last_line_is_found_at_once(two_runs, coordinator, records):
    tamper(coordinator.home / "ledger.sqlite", f"DELETE FROM ledger_entries WHERE seq = {records.folded.seq}")
    assert records.step() is True
    assert "set back" in records.problem
    assert records.step() is False


def test_a_change_further_up_is_found_by_the_next_whole_check(two_runs, coordinator):
    now = [1000.0]
    path = coordinator.home / "ledger.sqlite"
    records = settle(Records(str(path), threading.RLock(), recheck_s=50.0, clock=lambda: now[0]))
    tamper(path, "UPDATE ledger_entries SET body = '{}' WHERE seq = 2")
    settle(records)
    assert not records.problem
    now[0] += 51.0
    settle(records)
    assert "line 2" in records.problem


def test_a_chain_that_was_written_anew_is_found_although_it_verifies(two_runs, coordinator, tmp_path):
    now = [1000.0]
    path = coordinator.home / "ledger.sqlite"
    records = settle(Records(str(path), threading.RLock(), recheck_s=50.0, clock=lambda: now[0]))
    entries = list(coordinator.ledger.entries())
    coordinator.ledger.close()
    for file in path.parent.glob("ledger.sqlite*"):
        file.unlink()
    with Ledger(path) as forged:
        forged.append_many([Draft(one.kind, one.scope, one.body, one.key) for one in entries])
        forged.verify()
    settle(records)
    assert "set back" in records.problem


def test_a_ledger_that_verifies_again_is_read_anew(two_runs, coordinator):
    now = [1000.0]
    path = coordinator.home / "ledger.sqlite"
    original = next(one.text for one in coordinator.ledger.entries() if one.seq == 2)
    records = Records(str(path), threading.RLock(), recheck_s=50.0, clock=lambda: now[0])
    tamper(path, "UPDATE ledger_entries SET body = '{}' WHERE seq = 2")
    settle(records)
    assert records.problem
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE ledger_entries SET body = ? WHERE seq = 2", (original,))
    connection.close()
    now[0] += 60.0
    settle(records)
    settle(records)
    assert not records.problem
    assert records.folded.head == coordinator.ledger.head()


def test_a_ledger_that_cannot_be_read_keeps_what_was_read(two_runs, coordinator, records):
    path = coordinator.home / "ledger.sqlite"
    coordinator.ledger.close()
    path.rename(path.with_name("away"))
    records.step()
    assert "no such ledger" in records.unreachable
    assert records.folded.seq > 0
    assert not records.problem
    path.with_name("away").rename(path)
    records.step()
    assert not records.unreachable


def test_a_long_ledger_is_read_in_pieces(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        body = {"client": "c", "epsilon": 1.0, "registration": {
            "dataset": "d", "budget": None, "envelope": [], "public_key": "k", "group": None}}  # fmt: skip
        ledger.append_many([Draft("register", "f" * 16, {**body, "client": f"c{i}"}) for i in range(AT_ONCE + 5)])
        records = Records(str(tmp_path / "ledger.sqlite"), threading.RLock())
        records.step()
        assert records.folded.seq == AT_ONCE
        assert records.is_behind
        assert not records.complete
        settle(records)
        assert (records.folded.seq, records.complete) == (AT_ONCE + 5, True)
        assert records.folded.head == ledger.head()


def test_postgresql_is_followed_too(postgres_url):
    with Ledger(postgres_url) as ledger:
        body = {"client": "c", "epsilon": None, "registration": {
            "dataset": "d", "budget": None, "envelope": [], "public_key": "k", "group": None}}  # fmt: skip
        ledger.append("register", "f" * 16, body)
        records = settle(Records(postgres_url, threading.RLock()))
        assert records.folded.head == ledger.head()
        assert "cloister@" in records.name
        ledger.append("register", "e" * 16, body)
        assert records.step() is True
        assert records.folded.head == ledger.head()
        records.close()
