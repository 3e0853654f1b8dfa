"""Every byte of every column counts; whole lines too; and only an anchor shows a cut end."""

import random
import sqlite3

import pytest

from common.errors import LedgerCorrupt
from common.ledger import Draft, Ledger, verify_rows

COLUMNS = ("seq", "time_us", "kind", "scope", "key", "body", "salt", "previous", "hash")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, clock=lambda: 1234567890.123456) as ledger:
        ledger.append_many([
            Draft("reserve", f"run-{i % 3}", {"client": f"clinic-{i}", "ε": i / 7}, f"key-{i}" if i % 4 else None)
            for i in range(20)
        ])  # fmt: skip
    return path


def unlocked(path):
    """A connection of somebody who has the file: the triggers are gone."""
    connection = sqlite3.connect(path, isolation_level=None)
    for verb in ("update", "delete"):
        connection.execute(f"DROP TRIGGER ledger_entries_no_{verb}")
    connection.execute("DROP INDEX ledger_entries_key")
    connection.execute("DROP INDEX ledger_entries_previous")
    return connection


def is_detected(path, anchor=None):
    with Ledger(path, read_only=True) as ledger:
        try:
            ledger.verify(anchor=anchor)
        except LedgerCorrupt:
            return True
    return False


def rows_of(path):
    with Ledger(path, read_only=True) as ledger:
        return [tuple(row) for row in ledger.rows()]


def test_every_byte_position_of_every_column_of_twenty_lines_counts(path):
    rows = rows_of(path)
    assert verify_rows(rows) == 20
    chooser = random.Random(5)
    changed = 0
    for line, row in enumerate(rows):
        for column, value in enumerate(row):
            for other in variants(value, chooser):
                forged = [*rows[:line], (*row[:column], other, *row[column + 1 :]), *rows[line + 1 :]]
                with pytest.raises(LedgerCorrupt):
                    verify_rows(forged)
                changed += 1
    assert changed > 20 * 250


def variants(value, chooser):
    """The value with each of its byte positions changed once, and removed or retyped as a whole."""
    if isinstance(value, int):
        text = str(value)
        for position, digit in enumerate(text):
            yield int(text[:position] + chooser.choice([d for d in "0123456789" if d != digit]) + text[position + 1 :])
        yield text
        yield None
        return
    if value is None:
        yield "k"
        return
    raw = value.encode()
    for position, byte in enumerate(raw):
        replaced = bytearray(raw)
        replaced[position] = chooser.choice([b for b in range(256) if b != byte])
        yield replaced.decode(errors="surrogateescape").encode(errors="replace").decode()
    yield raw
    yield None
    yield value + "\n"


def test_a_change_in_the_file_is_found_in_every_column(path):
    for column in COLUMNS:
        copy = path.with_name(f"{column}.sqlite")
        copy.write_bytes(path.read_bytes())
        connection = unlocked(copy)
        new = {"seq": "21", "time_us": "time_us + 1"}.get(column, "'x'")
        connection.execute(f"UPDATE ledger_entries SET {column} = {new} WHERE seq = 7")
        connection.close()
        assert is_detected(copy), column


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM ledger_entries WHERE seq = 1",
        "DELETE FROM ledger_entries WHERE seq = 10",
        "UPDATE ledger_entries SET body = CAST(body AS BLOB) WHERE seq = 3",
        "UPDATE ledger_entries SET seq = -seq WHERE seq IN (4, 5); "
        "UPDATE ledger_entries SET seq = 9 + seq WHERE seq < 0",
        "INSERT INTO ledger_entries SELECT 21, time_us, kind, scope, NULL, body, salt, previous, hash "
        "FROM ledger_entries WHERE seq = 20",
        "INSERT INTO ledger_entries SELECT 0, time_us, kind, scope, NULL, body, salt, previous, hash "
        "FROM ledger_entries WHERE seq = 1",
    ],
)
def test_a_missing_moved_retyped_or_added_line_is_found(path, statement):
    assert not is_detected(path)
    connection = unlocked(path)
    connection.executescript(statement)
    connection.close()
    assert is_detected(path)


def test_moving_text_over_a_field_boundary_is_found(path):
    rows = rows_of(path)
    row = rows[4]
    forged = (*row[:2], "res", "erve" + row[3], *row[4:])
    with pytest.raises(LedgerCorrupt):
        verify_rows([*rows[:4], forged, *rows[5:]])
    with pytest.raises(LedgerCorrupt, match="wrong form"):
        verify_rows([*rows[:4], (*row[:2], f"{row[2]}\n{row[3]}", row[3], *row[4:]), *rows[5:]])


def test_a_cut_end_is_found_by_the_anchored_head_only(path):
    head = rows_of(path)[-1][-1]
    earlier = rows_of(path)[11][-1]
    assert not is_detected(path, anchor=head)
    connection = unlocked(path)
    connection.execute("DELETE FROM ledger_entries WHERE seq > 15")
    connection.close()
    assert not is_detected(path)
    assert not is_detected(path, anchor=earlier)
    assert is_detected(path, anchor=head)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DELETE FROM ledger_entries")
    connection.close()
    assert not is_detected(path)
    assert is_detected(path, anchor=earlier)
