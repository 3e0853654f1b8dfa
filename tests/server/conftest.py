"""A small federation without a model: real loop, real accountant, real Flower messages; trainers made of numpy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client.relay import build_relay, to_record
from common.config import RunConfig
from common.history import ClientHistory, ListRequest, SignedHistory
from common.ledger import Ledger
from common.messages import Description, Refusal, Reply, TrainRequest, adapter_hash
from common.signing import SigningKey
from deploy.simulation.inprocess_grid import InProcessGrid
from server.accountant import EmbeddedAccountant
from server.exchange import Exchange
from server.rounds import Listener, RoundLoop, keys_of
from server.terms import RunTerms, draw_up

INITIAL = {"layer.lora_B": np.zeros((4, 2), np.float32), "other.lora_B": np.zeros(3, np.float32)}
HEAD = "0" * 64


class FakeTrainer:
    """Answers what it is told to; keeps the requests it saw. ``behave`` gets the request and returns an answer."""

    def __init__(self, name: str, behave: Callable[[TrainRequest], object] | None = None, declared: int = 1000):
        self.name, self.key = name, SigningKey.generate()
        self.behave = behave or self.ordinary
        self.declared = declared
        self.seen: list[TrainRequest] = []

    def ordinary(self, request: TrainRequest) -> Reply:
        update = {name: np.full_like(array, 0.5) for name, array in request.adapter.items()}
        return Reply(update, request.reservation.reservation.reservation_id, HEAD)

    def refuse(self, request: TrainRequest, reason, voiding: bool, key: SigningKey | None = None) -> Refusal:
        signed_by = key or self.key
        return Refusal.sign(
            signed_by, request.reservation.reservation.reservation_id, request.request_hash, reason, voiding
        )

    def describe(self) -> Description:
        shapes = {name: array.shape for name, array in INITIAL.items()}
        return Description(
            self.name, self.name, self.key.public_key, self.declared, "b" * 64, shapes, tuple(shapes),
            adapter_hash(INITIAL),
        )  # fmt: skip

    def signed_list(self, request: ListRequest) -> SignedHistory:
        request.check()
        history = ClientHistory(self.name, request.coordinator, (), (), HEAD, request.challenge)
        return SignedHistory.sign(self.key, history)

    def train(self, request: TrainRequest):
        self.seen.append(request)
        return self.behave(request)


class Heard(Listener):
    """Remembers what the loop said."""

    def __init__(self):
        self.answers: list[tuple[int, str, str, str]] = []
        self.denials: list[tuple[int, str]] = []
        self.corrections: dict[str, object] = {}
        self.disagreements: list[tuple[str, str]] = []

    def answered(self, server_round, client, outcome, reason):
        self.answers.append((server_round, client, str(outcome), reason))

    def corrected(self, client, found):
        self.corrections[client] = found

    def disagreed(self, client, reason):
        self.disagreements.append((client, reason))

    def denied(self, server_round, denial):
        self.denials.append((server_round, denial.client))


class Federation:
    """Everything one run needs, on one folder; ``loop()`` may be called again, as after a restart."""

    def __init__(self, folder: Path, trainers, stack: list, **settings):
        self.folder = folder
        self.trainers = {trainer.name: trainer for trainer in trainers}
        self.config = RunConfig.from_mapping(
            {"rounds": 3, "expected-batch-size": 10, "server-optimizer": "fedavg", "server-learning-rate": 1.0}
            | settings
        )
        self.terms: RunTerms = draw_up(self.config, [t.describe() for t in trainers], "run")
        self.coordinator, self.accountants_key = SigningKey.generate(), SigningKey.generate()
        self.ledger = Ledger(folder / "ledger.sqlite")
        stack.append(self.ledger.close)
        self.accountant = EmbeddedAccountant(self.ledger, self.accountants_key)
        self.heard = Heard()
        self.written: list[tuple] = []
        self.app: ClientApp = build_relay(lambda context: self.trainers[str(context.node_config["client"])])

    def exchange(self, **options) -> Exchange:
        exchange = Exchange(InProcessGrid(self.app, sorted(self.trainers)), **options)
        self.descriptions = exchange.describe(len(self.trainers), 5.0)
        return exchange

    def loop(self, *, exchange=None, evaluate=None, **options) -> RoundLoop:
        exchange = exchange or self.exchange()
        return RoundLoop(
            terms=self.terms, initial=INITIAL, public_keys=keys_of(self.descriptions), exchange=exchange,
            accountant=self.accountant, key=self.coordinator, folder=self.folder, evaluate=evaluate,
            on_metrics=self.written.append, listener=self.heard, **options,
        )  # fmt: skip

    def spent(self, name: str):
        return self.accountant.spent("run", name)

    def outcomes(self, name: str) -> list[str | None]:
        return [held.outcome for held in self.accountant.counting("run", name)]


@pytest.fixture
def federation(tmp_path):
    """federation(trainers, **settings) -> a Federation in this test's folder."""
    stack: list = []
    yield lambda trainers, **settings: Federation(tmp_path, trainers, stack, **settings)
    for close in reversed(stack):
        close()


@pytest.fixture
def trainer():
    """trainer(name, behave=None, declared=1000) -> FakeTrainer."""
    return FakeTrainer


@pytest.fixture
def raw_app():
    """raw_app(make) -> ClientApp that answers ``describe`` for client ``a`` and trains by ``make(message)``."""

    def build(make: Callable[[Message], RecordDict]) -> ClientApp:
        app = ClientApp()
        described = FakeTrainer("a").describe()

        @app.query("describe")
        def describe(message, context):
            record = ConfigRecord({"json": json.dumps(described.to_json())})
            return Message(RecordDict({"description": record}), reply_to=message)

        @app.train()
        def train(message, context):
            return Message(make(message), reply_to=message)

        return app

    return build


def reply_record(body: object, arrays) -> RecordDict:
    """A reply as the relay makes it, with any body and any arrays."""
    record = arrays if isinstance(arrays, ArrayRecord) else to_record(arrays)
    text = body if isinstance(body, str) else json.dumps(body)
    return RecordDict({"reply": ConfigRecord({"json": text}), "update": record})


@pytest.fixture
def as_reply():
    return reply_record
