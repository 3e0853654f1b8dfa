"""Whoever reads a SQLite ledger keeps its writer from nothing, leaves nothing beside it, needs no right to write."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import Unavailable
from common.ledger import Ledger
from server.dashboard.records import Records

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 10.0
"""Far above what a line takes on a busy machine, far below SQLite's own patience with a lock that somebody holds."""

FOLLOW = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
from server.dashboard.records import Records
records = Records(sys.argv[1], threading.RLock())
while True:
    records.step()
    print(records.folded.seq, records.complete, repr(records.problem), repr(records.unreachable), flush=True)
    time.sleep(0.01)
"""
"""What the dashboard does with a ledger, over and over."""

HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
connection.execute("BEGIN")
print(connection.execute("SELECT count(*) FROM ledger_entries").fetchone()[0], flush=True)
time.sleep(600)
"""


def mounted(folder, *command):
    """``command`` where ``folder`` is mounted for reading alone, as the dashboard's container has it."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder), *map(str, command)]


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory):
    probe = tmp_path_factory.mktemp("probe")
    if shutil.which("unshare") is None or subprocess.run(mounted(probe, "true"), capture_output=True).returncode:
        pytest.skip("this user may not mount a folder for reading alone")  # needs root or user namespaces
    assert subprocess.run(mounted(probe, "touch", probe / "x"), capture_output=True).returncode


@contextmanager
def reading(folder, script=FOLLOW):
    """A reader's process in its own, read-only view of ``folder``; always ended."""
    arguments = [sys.executable, "-c", script, folder / "ledger.sqlite", ROOT]
    process = subprocess.Popen(mounted(folder, *arguments), stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def beside(folder):
    return {path.name: (path.stat().st_uid, path.stat().st_mode) for path in folder.iterdir()}


def append(ledger, count):
    """Write lines; the longest that one of them took."""
    longest = 0.0
    for number in range(count):
        started = time.monotonic()
        ledger.append("sending", "run-1", {"reservations": [], "number": number})
        longest = max(longest, time.monotonic() - started)
    return longest


def test_a_reader_leaves_nothing_beside_a_ledger_that_nobody_writes(tmp_path):
    """What SQLite puts there belongs to whoever was first: a writer of another user could not open it."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 3)
    before = beside(tmp_path)
    assert set(before) == {"ledger.sqlite"}
    with Ledger(path, read_only=True) as reader:
        assert reader.verify() == 3
        assert beside(tmp_path) == before
    assert beside(tmp_path) == before


def test_a_writer_that_begins_meanwhile_is_no_corruption(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 3)
    with Ledger(path, read_only=True) as reader:
        assert reader.verify() == 3
        with Ledger(path) as writer:
            with pytest.raises(Unavailable, match="read it again"):
                reader.verify()
            append(writer, 2)
        with pytest.raises(Unavailable, match="read it again"):
            reader.head()
    with Ledger(path, read_only=True) as reader:
        assert reader.verify() == 5


def test_the_dashboards_reader_follows_a_writer_through_a_folder_mounted_for_reading_alone(may_mount, tmp_path):
    """Before the writer comes, while it writes, after it was killed, and when it has come back."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 2)
    owners = beside(tmp_path)
    with reading(tmp_path) as reader:
        assert reader.stdout.readline().split()[0] == "2"
        with Ledger(path) as ledger:
            assert append(ledger, 200) < PATIENCE_S
            seen = follow_until(reader, 202)
        assert append_killed(path, 20)
        seen += follow_until(reader, 222)
        with Ledger(path) as ledger:
            append(ledger, 5)
            seen += follow_until(reader, 227)
            assert ledger.verify() == 227
    counts = [int(line.split()[0]) for line in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) > 5  # it saw the ledger grow
    assert not [line for line in seen if not line.split(maxsplit=2)[2].startswith("'' ")]  # never a false alarm
    assert {name: about for name, about in beside(tmp_path).items() if name in owners} == owners


def append_killed(path, count):
    """A writer's process that ends by ``kill -9`` after so many lines: what SQLite keeps beside the file stays."""
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from common.ledger import Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for _ in range(int(sys.argv[3])): ledger.append('sending', 'run-1', {'reservations': []})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, path, ROOT, str(count)], timeout=120)
    return done.returncode == -signal.SIGKILL and path.with_name(path.name + "-wal").stat().st_size > 0


def follow_until(reader, seq):
    """What the reader prints until it has read line ``seq``."""
    lines, deadline = [], time.monotonic() + 60
    while time.monotonic() < deadline:
        lines.append(reader.stdout.readline().strip())
        assert lines[-1], "the reader ended"
        if lines[-1].split()[0] == str(seq):
            return lines
    raise AssertionError(f"line {seq} was not seen in time; last: {lines[-1]}")


@pytest.mark.parametrize("ending", [signal.SIGSTOP, signal.SIGKILL])
def test_a_reader_that_hangs_or_dies_in_the_middle_of_reading_keeps_the_writer_from_nothing(
    may_mount, tmp_path, ending
):
    """It holds its view of the ledger open; lines, and giving the space of the log back, go on."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 10)
        with reading(tmp_path, HOLD) as reader:
            assert reader.stdout.readline().strip() == "10"
            os.kill(reader.pid, ending)
            assert append(ledger, 400) < PATIENCE_S  # more pages than SQLite keeps in its log before it empties it
            assert ledger.verify() == 410
        append(ledger, 1)
    assert set(beside(tmp_path)) == {"ledger.sqlite"}  # the writer tidied up: nobody's lock was left
    with Ledger(path) as ledger:
        assert ledger.verify() == 411


def test_readers_without_the_right_to_write_write_nothing(may_mount, tmp_path):
    """Not into the file either: what one of them tries, its mount and its way of opening forbid."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 2)
        script = (
            "import sys; sys.path.insert(0, sys.argv[2])\n"
            "from common.ledger import Ledger; import common.errors as errors, sqlalchemy as sa\n"
            "reader = Ledger(sys.argv[1], read_only=True)\n"
            "for statement in ('DELETE FROM ledger_entries', 'CREATE TABLE mine (x)'):\n"
            "    try:\n"
            "        with reader._engine.connect() as connection:\n"
            "            print(connection.exec_driver_sql(statement).all())\n"
            "    except sa.exc.DBAPIError as error: print('refused')\n"
            "    except sa.exc.ResourceClosedError: print('done')\n"
        )
        arguments = mounted(tmp_path, sys.executable, "-c", script, path, ROOT)
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines() == ["refused", "refused"]
        append(ledger, 1)
        assert ledger.verify() == 3


def test_a_dashboard_whose_writer_begins_looks_again(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        append(ledger, 2)
    records = Records(str(path), threading.RLock())
    records.step()
    with Ledger(path) as ledger:
        append(ledger, 3)
        records.step()
        assert (records.folded.seq, records.problem, records.unreachable) == (5, "", "")
    records.step()
    assert (records.folded.seq, records.problem) == (5, "")
