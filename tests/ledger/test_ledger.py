"""The contract of ``common.ledger.Ledger``, on SQLite and on PostgreSQL."""

import json
import sqlite3
import threading

import pytest
import sqlalchemy as sa

from common.errors import InvalidInput, LedgerCorrupt, Refused, Unavailable
from common.ledger import GENESIS, Draft, Ledger, scope_hash
from common.ledger_schema import ENTRIES


def fill(ledger, count=20):
    drafts = [
        Draft("reserve", f"run-{index % 3}", {"client": f"clinic-{index}", "ε": 0.1 * index}, f"key-{index}")
        for index in range(count)
    ]
    return ledger.append_many(drafts)


def test_entries_come_back_in_order_as_they_were_written(ledger):
    written = fill(ledger)
    assert list(ledger.entries()) == written
    assert [entry.seq for entry in written] == list(range(1, 21))
    assert [entry.body["client"] for entry in ledger.entries(scope="run-1")] == [f"clinic-{i}" for i in range(1, 20, 3)]
    assert list(ledger.entries(kind="other")) == []
    assert [entry.seq for entry in ledger.entries(after=18)] == [19, 20]
    assert ledger.verify() == 20
    assert len({entry.salt for entry in written}) == 20
    assert all(len(entry.salt) == 64 for entry in written)


def test_the_same_key_and_content_give_the_stored_entry(ledger):
    first = ledger.append("reserve", "run", {"a": 1, "b": 2}, idempotency_key="k")
    assert ledger.append("reserve", "run", {"b": 2, "a": 1}, idempotency_key="k") == first
    assert ledger.verify() == 1


@pytest.mark.parametrize(
    ("kind", "scope", "body"), [("x", "run", {"a": 1}), ("reserve", "y", {"a": 1}), ("reserve", "run", {"a": 2})]
)
def test_the_same_key_with_other_content_is_refused_and_nothing_is_written(ledger, kind, scope, body):
    ledger.append("reserve", "run", {"a": 1}, idempotency_key="k")
    head = ledger.head()
    with pytest.raises(Refused, match="this key was used"):
        ledger.append_many([Draft("other", "run", {}), Draft(kind, scope, body, "k")])
    assert ledger.head() == head


def test_a_key_repeated_within_one_call_is_one_line(ledger):
    one, two = ledger.append_many([Draft("a", "s", {"x": 1}, "k"), Draft("a", "s", {"x": 1}, "k")])
    assert one == two
    assert ledger.verify() == 1


def test_what_is_written_is_there_after_reopening(open_ledger):
    head = fill(open_ledger())[-1].hash
    again = open_ledger()
    assert again.head() == head
    assert again.verify(anchor=head) == 20


def test_an_error_inside_exclusive_leaves_nothing(ledger):
    ledger.append("a", "s", {})
    before, scope_before = ledger.head(), ledger.head("s")

    def stop_halfway():
        with ledger.exclusive():
            ledger.append("b", "s", {})
            assert ledger.head("s") != scope_before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert (ledger.head(), ledger.head("s"), ledger.verify()) == (before, scope_before, 1)


def test_a_scope_has_a_chain_of_its_own_that_does_not_depend_on_other_scopes(ledger):
    entries = fill(ledger)
    head = GENESIS
    for entry in entries:
        if entry.scope == "run-2":
            head = scope_hash(head, entry.content)
    assert ledger.head("run-2") == head
    ledger.append("noise", "run-0", {})
    assert ledger.head("run-2") == head
    ledger.append("more", "run-2", {})
    assert ledger.head("run-2") != head
    assert ledger.head("nobody") == GENESIS


def test_two_writers_never_fork_the_chain(open_ledger):
    ledgers = [open_ledger(), open_ledger()]
    errors = []

    def write(ledger, name):
        try:
            for _ in range(25):
                with ledger.exclusive():
                    count = sum(1 for _ in ledger.entries())
                    ledger.append("count", name, {"seen": count})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(ledger, f"w{i}")) for i, ledger in enumerate(ledgers * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledgers[0].verify() == 100
    assert [entry.body["seen"] for entry in ledgers[1].entries()] == list(range(100))


def test_a_clock_that_goes_backwards_does_not_change_the_order(open_ledger):
    times = iter([300.0, 200.0, 100.0])
    ledger = open_ledger(clock=lambda: next(times))
    for name in "abc":
        ledger.append(name, "s", {})
    assert [(entry.kind, entry.time) for entry in ledger.entries()] == [("a", 300.0), ("b", 200.0), ("c", 100.0)]
    assert ledger.verify() == 3


@pytest.mark.parametrize(
    ("kind", "scope", "body", "key"),
    [
        ("", "s", {}, None),
        ("a\nb", "s", {}, None),
        ("a", "s\0", {}, None),
        ("a", "s", {}, ""),
        ("a", "s", {"x": float("nan")}, None),
        ("a", "s", {"x": object()}, None),
        ("a", "s", {"x": "\ud800"}, None),
        ("a\ud800", "s", {}, None),
    ],
)
def test_what_cannot_be_stored_is_invalid_and_nothing_is_written(ledger, kind, scope, body, key):
    with pytest.raises(InvalidInput):
        ledger.append(kind, scope, body, idempotency_key=key)
    assert ledger.head() == GENESIS


@pytest.mark.parametrize("statement", [sa.update(ENTRIES).values(body="{}"), sa.delete(ENTRIES)])
def test_the_table_refuses_changes(ledger, statement):
    fill(ledger)
    with pytest.raises(Unavailable, match="append-only"), ledger.exclusive() as connection:
        connection.execute(statement)
    assert ledger.verify() == 20


def test_a_read_only_ledger_cannot_be_written_and_creates_nothing(tmp_path):
    with pytest.raises(Unavailable, match="no such ledger"):
        Ledger(tmp_path / "missing.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "there.sqlite"
    with Ledger(path) as ledger:
        fill(ledger)
    with Ledger(path, read_only=True) as reader:
        assert reader.verify() == 20
        with pytest.raises(Refused, match="reading only"):
            reader.append("a", "s", {})


def test_a_storage_that_cannot_be_written_fails_closed(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        fill(ledger)
        with ledger.exclusive() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(Unavailable, match="cannot be used"):
            ledger.append("a", "s", {})
        assert ledger.verify() == 20


def test_a_full_disk_fails_closed_and_nothing_is_half_written(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        fill(ledger)
        with ledger.exclusive() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(Unavailable, match="full"):
            ledger.append_many([Draft("a", "s", {"x": "y" * 5000})] * 100)
        assert ledger.verify() == 20


def test_only_sqlite_and_postgresql_are_known(tmp_path):
    with pytest.raises(InvalidInput, match="not supported"):
        Ledger("mysql://host/name")
    with pytest.raises(Unavailable):
        Ledger("postgresql+psycopg://nobody@127.0.0.1:1/none")
    path = tmp_path / "by-url.sqlite"
    with Ledger(f"sqlite:///{path}") as ledger:
        fill(ledger)
    assert path.stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_database_is_corrupt(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(LedgerCorrupt):
        Ledger(path)


def test_the_body_is_stored_as_canonical_text(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.append("a", "s", {"b": [1, 2.5], "a": "ε"})
    connection = sqlite3.connect(path)
    (text,) = connection.execute("SELECT body FROM ledger_entries").fetchone()
    connection.close()
    assert text == '{"a":"ε","b":[1,2.5]}'
    assert json.loads(text) == {"a": "ε", "b": [1, 2.5]}


def test_a_long_ledger_is_read_in_pages(ledger, monkeypatch):
    from common import ledger as room

    monkeypatch.setattr(room, "_PAGE", 7)
    written = fill(ledger, 20)
    assert list(ledger.entries()) == written
    assert ledger.verify(anchor=written[6].hash) == 20
    head = GENESIS
    for entry in written:
        head = scope_hash(head, entry.content) if entry.scope == "run-1" else head
    assert ledger.head("run-1") == head
    assert [entry.seq for entry in ledger.follow(seq=14, head=written[13].hash)] == list(range(15, 21))


def test_following_from_a_wrong_head_is_found(ledger):
    written = fill(ledger, 5)
    with pytest.raises(LedgerCorrupt):
        list(ledger.follow(seq=3, head=written[0].hash))


def test_places_that_hold_no_ledger_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="neither a path"):
        Ledger("://nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unavailable, match="cannot be created"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_a_missing_driver_is_named_with_the_way_out(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidInput, match=r"cloister\[postgres\]"):
        Ledger("postgresql+psycopg://nobody@127.0.0.1:1/none")


def test_an_auditors_copy_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    path = tmp_path / "copy.sqlite"
    with Ledger(path) as ledger:
        head = fill(ledger)[-1].hash
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda *_: False)
    with Ledger(path, read_only=True) as reader:
        assert reader.verify(anchor=head) == 20
        assert sorted(tmp_path.iterdir()) == before
