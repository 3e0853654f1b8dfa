"""A writer killed at any moment: whatever it was told is durable is there, and the chain is whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.ledger import Ledger

ROOT = Path(__file__).parents[2]

WRITER = """
import sys
from common.ledger import Draft, Ledger
with Ledger(sys.argv[1]) as ledger:
    while True:
        entries = ledger.append_many([Draft("a", "s", {"n": i}) for i in range(3)])
        sys.stdout.write(f"{entries[-1].seq} {entries[-1].hash}\\n")
        sys.stdout.flush()
"""


def kill_a_writer_after(seconds, storage, log):
    with log.open("w") as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        writer = subprocess.Popen([sys.executable, "-c", WRITER, storage], stdout=output, env=environment, cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while not log.stat().st_size:  # it has started to write
                assert writer.poll() is None, "the writer ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(seconds)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    promised = [line.split() for line in log.read_text().splitlines() if len(line.split()) == 2]
    return [(int(seq), digest) for seq, digest in promised if len(digest) == 64]


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_writer_has_lost_nothing_that_it_was_promised(storage, tmp_path, kills):
    chooser = random.Random(11)
    promised = []
    for kill in range(kills):
        promised += kill_a_writer_after(chooser.uniform(0.0, 0.15), storage, tmp_path / f"log-{kill}")
        with Ledger(storage) as ledger:
            count = ledger.verify(anchor=promised[-1][1])
            hashes = {entry.seq: entry.hash for entry in ledger.entries()}
        assert all(hashes[seq] == digest for seq, digest in promised)
        assert count % 3 == 0  # a transaction of three lines is there as a whole or not at all
    assert len(promised) >= kills
