"""An organisation with a policy, a ledger in use, and a trainer's socket; and its page in this process."""

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from client.admission import Granted
from client.dashboard.app import build_app
from client.dashboard.view import Lookout
from client.guard import Guard
from client.policy import Policy
from client.progress import Progress, serve_status, status_of
from common.messages import Envelope, Plan, Reservation, SignedReservation, TrainRequest, adapter_hash
from common.pages.access import Token
from common.privacy import SampledGaussian
from common.signing import SigningKey

with warnings.catch_warnings():  # Starlette's client uses a name that anyio 4.15 renames
    warnings.simplefilter("ignore", DeprecationWarning)
    from starlette.testclient import TestClient

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=4)
ADAPTER = {"a.lora_B": np.zeros((4, 2), np.float32)}
SHAPES = {name: array.shape for name, array in ADAPTER.items()}
TOKEN = "T" * 43
PORT = 8123
START = 1_800_000_000.0

POLICY = """\
organisation = "clinic-a"
min-noise-multiplier = 0.5
max-sample-rate = 0.05
max-steps-per-round = 8
backbones = ["{backbone}"]
coordinator-keys = {coordinators}
accountant-keys = ["{accountant}"]
{anchor}
[datasets.notes]
declared-records = 1000
target-epsilon = 2.0
run-delta = 2e-6
[datasets.labs]
declared-records = 5000
target-epsilon = 4.0
group = "patients"
"""


class Organisation:
    """Its files, its guard, and what coordinators ask of it."""

    def __init__(self, folder: Path, anchor: bool = False):
        self.folder, self.time, self.count = folder, START, 0
        self.coordinators = [SigningKey.generate() for _ in range(2)]
        self.accountant = SigningKey.generate()
        self.policy_path = folder / "policy.toml"
        self.policy_path.write_text(
            POLICY.format(
                backbone="b" * 64, coordinators=json.dumps([key.public_key for key in self.coordinators]),
                accountant=self.accountant.public_key, anchor=f'anchor = "{folder}/head"' if anchor else "",
            )
        )  # fmt: skip
        self.ledger_path = folder / "ledger.sqlite"
        self.sockets = tempfile.TemporaryDirectory(prefix="cloister-")
        self.socket = Path(self.sockets.name) / "status.sock"
        self.progress, self.server, self.guard = Progress(clock=lambda: self.time), None, None

    def open(self):
        self.guard = Guard(
            Policy.load(self.policy_path), self.ledger_path, key=SigningKey.generate(), clock=lambda: self.time
        )
        return self.guard

    def close(self):
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.socket.unlink(missing_ok=True)
            self.server = None
        if self.guard is not None:
            self.guard.close()

    def start_trainer(self):
        self.server = serve_status(self.socket, lambda: status_of(self.guard, "notes", self.progress))

    def request(self, by=0, **changes):
        self.count += 1
        self.time += 60.0
        values = {
            "run_id": "run-1", "server_round": 1, "client": "clinic-a", "dataset": "notes", "attempt": 1,
            "participation": 0, "event": EVENT, "local_steps": EVENT.steps, "clipping_norm": 1.0,
            "expected_batch_size": 10.0, "declared_records": 1000, "optimizer": "adam", "learning_rate": 0.01,
            "aggregation": "ffa", "backbone_hash": "b" * 64, "adapter_hash": adapter_hash(ADAPTER),
            "envelope": Envelope((EVENT,) * 3),
        }  # fmt: skip
        plan = Plan(**{**values, **changes})
        names = ("run_id", "server_round", "client", "dataset", "attempt", "event")
        reservation = Reservation(f"{self.count:032x}", **{name: getattr(plan, name) for name in names})
        head = "a" * 64
        signed = SignedReservation(
            reservation, self.accountant.sign("reservation", reservation.to_json()), head,
            self.accountant.sign("head", {"head": head}),
        )  # fmt: skip
        return TrainRequest(plan, self.coordinators[by].sign("plan", plan.to_json()), signed, ADAPTER)

    def train(self, request, *, finish=True):
        """As the trainer does it, with its progress; False where the guard refuses."""
        ours = self.progress.begin(request)
        try:
            admission = self.guard.admit(request, shapes=SHAPES)
            if not isinstance(admission, Granted):
                self.progress.tell(request, "refused", str(admission.refusal.reason))
                return False
            self.guard.start(request)
            if not finish:
                return True
            self.guard.finish(request, {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
            self.progress.tell(request, "reply")
            return True
        finally:
            if ours and finish:
                self.progress.end()

    def lookout(self):
        return Lookout(self.policy_path, self.ledger_path, self.socket, clock=lambda: self.time)

    def page(self, **headers):
        """A browser on this machine; a new one has seen nothing yet."""
        app = build_app(self.lookout(), Token(TOKEN), port=PORT)
        return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", headers=headers, follow_redirects=False)


@pytest.fixture
def organisation(tmp_path):
    found = Organisation(tmp_path)
    found.open()
    yield found
    found.close()
    found.sockets.cleanup()


@pytest.fixture
def anchored(tmp_path):
    found = Organisation(tmp_path, anchor=True)
    found.open()
    yield found
    found.close()
    found.sockets.cleanup()


@pytest.fixture
def used(organisation):
    """Two runs of two coordinators: three releases, one loss, two refusals for good."""
    for server_round in (1, 2):
        request = organisation.request(server_round=server_round, participation=server_round - 1)
        assert organisation.train(request)
    assert organisation.train(organisation.request(by=1, run_id="run-2"))
    assert not organisation.train(organisation.request(by=1, run_id="run-3", backbone_hash="c" * 64))
    costly = SampledGaussian(0.5, 0.05, 8)
    plan = {"event": costly, "local_steps": 8, "envelope": Envelope((costly,) * 9), "expected_batch_size": 50.0}
    assert not organisation.train(organisation.request(run_id="run-4", **plan))
    organisation.train(organisation.request(server_round=3, participation=2), finish=False)
    organisation.guard.close()
    organisation.progress.end()
    organisation.open()  # what had started and has no reply is lost now
    organisation.start_trainer()
    return organisation
