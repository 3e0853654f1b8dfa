"""How fast the books are: one round of 1,000 clients, and verification beside the barest loop that could do it.

    python benchmarks/ledger.py [--rounds 30] [--clients 1000] [--url postgresql+psycopg://...]

Prints median and 95th percentile of reserve + sending + commit of a whole round (each durable), per storage, embedded
and over gRPC (Unix socket; server and caller in this process, so the CPU time is that of both), and the
rate of ``Ledger.verify`` as a share of a bare sqlite3 + SHA-256 loop over the same file in the same process, taken in
turns. Results with date and machine go to benchmarks/LOG.md by hand.
"""

import argparse
import hashlib
import json
import os
import sqlite3
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common.ledger import GENESIS, Ledger
from common.messages import Envelope
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Ask, Budget, EmbeddedAccountant, Outcome, Registration
from server.accountant_service import serve
from server.remote_accountant import RemoteAccountant

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)


@contextmanager
def opened(storage, over_grpc):
    """An accountant on ``storage``: embedded, or behind its service."""
    with Ledger(storage) as ledger:
        embedded = EmbeddedAccountant(ledger, SigningKey.generate())
        if not over_grpc:
            yield embedded
            return
        with tempfile.TemporaryDirectory() as folder:
            server, address = serve(embedded, f"unix:{folder}/socket", tls=None)
            with RemoteAccountant(address, timeout_s=300) as remote:
                yield remote
            server.stop(None).wait()


def rounds(storage, clients, count, *, over_grpc=False):
    """Seconds of each round: all clients reserved, marked and committed, every step on stable storage."""
    names = [f"clinic-{index}" for index in range(clients)]
    registration = Registration(
        "notes", Budget(50.0, 1e-5), Envelope((EVENT,) * count), SigningKey.generate().public_key
    )
    seconds, cpu = [], []
    with opened(storage, over_grpc) as accountant:
        run_id = f"run-{time.time_ns()}"
        accountant.register(run_id, dict.fromkeys(names, registration))
        for number in range(1, count + 1):
            started, started_cpu = time.perf_counter(), time.process_time()
            answer = accountant.reserve(run_id, number, [Ask(name, EVENT) for name in names])
            ids = [signed.reservation.reservation_id for signed in answer.granted]
            accountant.sending(run_id, ids)
            accountant.commit(run_id, dict.fromkeys(ids, Outcome.REPLIED))
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
            if len(ids) != clients:
                raise SystemExit(f"round {number}: {len(ids)} of {clients} clients were granted")
    return seconds, cpu


def bare_loop(path):
    """Every row read and hashed once, chained to the one before; nothing is compared."""
    connection = sqlite3.connect(path)
    head, count = GENESIS, 0
    for row in connection.execute("SELECT * FROM ledger_entries ORDER BY seq"):
        head = hashlib.sha256(f"{head}{row}".encode()).hexdigest()
        count += 1
    connection.close()
    return count


def verify(path):
    with Ledger(path, read_only=True) as ledger:
        return ledger.verify()


def timed(call, *arguments):
    started = time.perf_counter()
    count = call(*arguments)
    return count / (time.perf_counter() - started)


def quantiles(measured):
    seconds, cpu = measured
    ordered = sorted(seconds)
    return {
        "median_ms": round(1e3 * statistics.median(ordered), 1),
        "median_cpu_ms": round(1e3 * statistics.median(cpu), 1),
        "p95_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--url", help="an empty PostgreSQL database to measure too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        found = {"clients": options.clients, "rounds": options.rounds}
        storages = {"sqlite": path} | ({"postgresql": options.url} if options.url else {})
        for name, storage in storages.items():
            for way, over_grpc in (("embedded", False), ("grpc", True)):
                found[f"{name} {way}"] = quantiles(
                    rounds(storage, options.clients, options.rounds, over_grpc=over_grpc)
                )
        found["load"] = [round(value, 1) for value in os.getloadavg()]
        pairs = [(timed(bare_loop, path), timed(verify, path)) for _ in range(5)]
        found["verify_lines_per_s"] = round(statistics.median(own for _, own in pairs))
        found["bare_lines_per_s"] = round(statistics.median(bare for bare, _ in pairs))
        found["verify_share_of_bare"] = round(statistics.median(own / bare for bare, own in pairs), 3)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
