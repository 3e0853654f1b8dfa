"""Memory of the coordinator with 10, 50 and 200 simulated clients: the real round loop, accountant and messages.

    python benchmarks/coordinator_memory.py [--clients 10 50 200] [--rounds 3] [--mib 4]

Each number of clients has a fresh process: the round loop with its accountant on a SQLite ledger, Flower's messages and
the relay. The clients are made when they are asked and hold nothing: one update of ``--mib`` MiB each, drawn at random.
Printed is the peak of the resident memory above what the process had before its first round, and what each client more
adds to it; were updates kept until a round's end, that would be ``--mib`` MiB.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from client.relay import build_relay
from common.config import RunConfig
from common.history import ClientHistory, SignedHistory
from common.ledger import Ledger
from common.messages import Description, Reply, adapter_hash
from common.signing import SigningKey
from deploy.simulation.inprocess_grid import InProcessGrid
from server.accountant import EmbeddedAccountant
from server.exchange import Exchange
from server.rounds import RoundLoop, keys_of
from server.terms import draw_up

HEAD = "0" * 64


class Client:
    """Says who it is, signs an empty list, and answers with an update that nobody else has."""

    def __init__(self, name, key, initial):
        self._name, self._key, self._initial = name, key, initial

    def describe(self):
        shapes = {name: array.shape for name, array in self._initial.items()}
        return Description(
            self._name, self._name, self._key.public_key, 1000, "b" * 64, shapes, tuple(shapes),
            adapter_hash(self._initial),
        )  # fmt: skip

    def signed_list(self, request):
        return SignedHistory.sign(
            self._key, ClientHistory(self._name, request.coordinator, (), (), HEAD, request.challenge)
        )

    def train(self, request):
        chooser = np.random.default_rng()
        update = {
            name: chooser.standard_normal(array.shape).astype(np.float32) for name, array in self._initial.items()
        }
        return Reply(update, request.reservation.reservation.reservation_id, HEAD)


def resident(kind):
    """MiB of this process: VmRSS now, VmHWM the peak up to now."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def measure(clients, rounds, mib):
    """Peak resident memory of all rounds above that before the first, MiB."""
    initial = {"layer.lora_B": np.zeros((round(mib * 2**20) // 4096, 1024), np.float32)}
    names = [f"client-{number:04d}" for number in range(1, clients + 1)]
    keys = {name: SigningKey.generate() for name in names}
    app = build_relay(lambda context: Client(name := str(context.node_config["client"]), keys[name], initial))
    config = RunConfig.from_mapping({"rounds": rounds, "expected-batch-size": 10})
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        exchange = Exchange(InProcessGrid(app, names))
        descriptions = exchange.describe(clients, 600.0)
        loop = RoundLoop(
            terms=draw_up(config, descriptions, "run"), initial=initial, public_keys=keys_of(descriptions),
            exchange=exchange, accountant=EmbeddedAccountant(ledger, SigningKey.generate()),
            key=SigningKey.generate(), folder=Path(folder),
        )  # fmt: skip
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        done = loop.run()
        peak = resident("VmHWM")
    assert [line["round"] for line in done.metrics] == list(range(rounds + 1))
    return peak - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=float, default=4.0)
    parser.add_argument("--here", action="store_true", help="measure the first number in this process")
    options = parser.parse_args()
    if options.here:
        print(f"{measure(options.clients[0], options.rounds, options.mib):.2f}")
        return
    peaks = {}
    for clients in options.clients:
        command = [sys.executable, __file__, "--here", "--clients", str(clients)]
        command += ["--rounds", str(options.rounds), "--mib", str(options.mib)]
        peaks[clients] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{clients} clients, {options.rounds} rounds, updates of {options.mib:g} MiB: {peaks[clients]:.1f} MiB")
    few, many = min(peaks), max(peaks)
    if few < many:
        each = (peaks[many] - peaks[few]) / (many - few)
        print(f"each client more: {1024 * each:.1f} KiB, {each / options.mib:.2%} of an update")


if __name__ == "__main__":
    main()
