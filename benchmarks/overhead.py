"""Round overhead between processes, beside a stock Flower 1.41 app of the same model on the same SuperLink and nodes.

    python benchmarks/overhead.py [--rounds 5] [--pairs 3]

Overhead of a round = the round's seconds at the coordinator minus the slowest client's seconds of training. Runs of the
two take turns on one federation of real processes on loopback (SuperLink, SuperExec, two SuperNodes; our trainers are
warm, and a stock app has nothing that could be). A run's first round is left out on both sides. Seconds are wall clock,
because waiting is what an overhead is made of: run it on a machine that does nothing else.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest, StreamLogsRequest
from flwr.supercore.fab import Fab

from common.ledger import Ledger
from deploy.running.flower_control import FlowerControl
from deploy.workshop import DEMO_BACKBONE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "deployment"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from loopback import Loopback
from stock_app import FILES

BUDGET = "target-epsilon = 100.0\nrun-epsilon = 9.0\nrun-delta = 1e-6"
"""Room for ten runs."""


def ours(federation, rounds):
    """Overhead of every round but the first of one of our runs."""
    run = federation.submit(rounds=rounds, quorum=len(federation.names))
    ended = federation.wait_end(run)
    assert ended["state"] == "finished", ended
    trained = [training(federation.client_ledger(name), run) for name in federation.names]
    lines = federation.metrics(run)[2:]
    return [line["seconds"] - max(own[line["round"]] for own in trained) for line in lines]


def training(ledger, run):
    """Seconds between ``started`` and ``replied`` in an organisation's own ledger, by round."""
    begun, seconds, rounds = {}, {}, {}
    with Ledger(ledger, read_only=True) as book:
        for entry in book.entries():
            body = json.loads(entry.text)
            if entry.kind == "reserved" and body["run_id"] == run:
                rounds[body["reservation_id"]] = body["server_round"]
            elif entry.kind == "started":
                begun[body["reservation_id"]] = entry.time
            elif entry.kind == "replied" and body["reservation_id"] in rounds:
                seconds[rounds[body["reservation_id"]]] = entry.time - begun[body["reservation_id"]]
    return seconds


def stock(federation, rounds):
    """Overhead of every round but the first of one run of the stock app."""
    content, _ = build_fab_from_files(FILES)
    settings = {
        "rounds": rounds, "backbone": str(DEMO_BACKBONE), "records": str(federation.folder / "east" / "records.jsonl"),
    }  # fmt: skip
    with FlowerControl(federation.address) as control:
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(settings))
        number = control._client.StartRun(request).run_id
        while not ((found := control.show(number)) and found.is_over):
            time.sleep(1)
        asked = StreamLogsRequest(run_id=number, after_timestamp=0.0)
        said = "".join(piece.log_output for piece in control._client.StreamLogs(asked))
    lines = [json.loads(line.split("STOCK ", 1)[1]) for line in said.splitlines() if "STOCK {" in line]
    assert [len(line["training"]) for line in lines] == [len(federation.names)] * rounds, said[-3000:]
    return [line["seconds"] - max(line["training"]) for line in lines[1:]]


def spread(seconds):
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cl-") as folder, tempfile.TemporaryDirectory(prefix="cl-") as sockets:
        federation = Loopback(Path(folder), Path(sockets), run="target-delta = 1e-6\n", budget=BUDGET)
        try:
            federation.start_all()
            ratios = []
            for pair in range(1, options.pairs + 1):
                own, theirs = ours(federation, options.rounds), stock(federation, options.rounds)
                ratios.append(statistics.median(own) / statistics.median(theirs))
                print(f"pair {pair}: ours {spread(own)}, stock {spread(theirs)}, ratio {ratios[-1]:.3f}", flush=True)
            low, high = min(ratios), max(ratios)
            print(f"overhead of ours over stock: median {statistics.median(ratios):.3f} ({low:.3f}–{high:.3f})")
        finally:
            federation.stop()


if __name__ == "__main__":
    main()
