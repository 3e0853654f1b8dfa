"""A coordinator that forgot is corrected by what its clients signed; a contradiction stops it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from client.admission import Granted
from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from common.accounts import Reconciled
from common.errors import InvalidInput, Refused
from common.history import ClientHistory, SignedHistory
from common.ledger import Ledger
from common.messages import Envelope, Plan, TrainRequest, adapter_hash
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Ask, Budget, EmbeddedAccountant, Outcome, Registration
from server.accountant_service import serve
from server.remote_accountant import RemoteAccountant

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
ADAPTER = {"a": np.zeros((2, 2), np.float32)}
SHAPES = {"a": (2, 2)}


class World:
    """A coordinator that can be set back to a backup, and one client that cannot."""

    def __init__(self, folder):
        self.folder = folder
        self.coordinator, self.key, self.client = (SigningKey.generate() for _ in range(3))
        policy = Policy(
            organisation="a",
            datasets={"notes": DatasetPolicy(declared_records=1000, target_epsilon=3.0)},
            min_noise_multiplier=0.5,
            max_sample_rate=0.1,
            max_steps_per_round=100,
            backbones=("b",),
            coordinator_keys=(self.coordinator.public_key,),
            accountant_keys=(self.key.public_key,),
        )
        self.guard = Guard(policy, folder / "client.sqlite", key=self.client)
        self.open()

    def open(self):
        self.ledger = Ledger(self.folder / "server.sqlite")
        self.server, address = serve(EmbeddedAccountant(self.ledger, self.key), "127.0.0.1:0", tls=None)
        self.accountant = RemoteAccountant(address, timeout_s=30)

    def stop(self):
        self.accountant.close()
        self.server.stop(None).wait()
        self.ledger.close()

    def backup(self):
        self.stop()
        shutil.copy(self.folder / "server.sqlite", self.folder / "backup.sqlite")
        self.open()

    def restore(self):
        self.stop()
        shutil.copy(self.folder / "backup.sqlite", self.folder / "server.sqlite")
        self.open()

    def close(self):
        self.stop()
        self.guard.close()

    def register(self):
        budget = Budget(3.0, 1e-5)
        self.accountant.register(
            "run", {"a": Registration("notes", budget, Envelope((EVENT,) * 6), self.client.public_key)}
        )

    def round(self, number, attempt=1, *, commit=True):
        answer = self.accountant.reserve("run", number, [Ask("a", EVENT, attempt)])
        (signed,) = answer.granted
        reservation = signed.reservation
        plan = Plan(
            "run", number, "a", "notes", attempt, answer.participation[reservation.reservation_id], EVENT, 100, 1.0,
            10.0, 1000, "adam", 0.1, "ffa", "b", adapter_hash(ADAPTER), Envelope((EVENT,) * 6),
        )  # fmt: skip
        request = TrainRequest(plan, self.coordinator.sign("plan", plan.to_json()), signed, ADAPTER)
        self.accountant.sending("run", [reservation.reservation_id])
        admission = self.guard.admit(request, shapes=SHAPES)
        if isinstance(admission, Granted):
            self.guard.start(request)
            self.guard.finish(request, ADAPTER)
        if commit:
            self.accountant.commit("run", {reservation.reservation_id: Outcome.REPLIED})
        return reservation.reservation_id

    def reconcile(self, signed=None, **changes):
        options = {"public_key": self.client.public_key, "coordinator": self.coordinator.public_key, **changes}
        return self.accountant.reconcile(signed or self.guard.history(self.coordinator.public_key), **options)

    def forge(self, **changes):
        history = self.guard.history(self.coordinator.public_key).history
        return SignedHistory.sign(self.client, replace(history, **changes))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def test_a_coordinator_restored_from_an_old_backup_learns_what_it_forgot(world):
    world.register()
    world.round(1)
    world.backup()
    forgotten = [world.round(2), world.round(3)]
    truth = world.accountant.spent("run", "a")
    world.restore()
    assert world.accountant.spent("run", "a").epsilon < truth.epsilon
    assert world.reconcile() == Reconciled(tuple(forgotten), ())
    assert world.accountant.spent("run", "a") == truth
    assert world.accountant.open("run") == ()
    assert world.accountant.participations("run", "a") == 3
    assert world.reconcile() == Reconciled((), ())
    world.round(4)
    assert len(world.accountant.spent("run", "a").events) == 4


def test_a_run_that_was_forgotten_whole_is_charged_again(world):
    world.backup()
    world.register()
    ids = (world.round(1), world.round(2))
    truth = world.accountant.spent("run", "a")
    world.restore()
    assert world.reconcile().imported == ids
    spent = world.accountant.spent("run", "a")
    assert (spent.events, spent.epsilon, spent.target_delta) == (truth.events, truth.epsilon, truth.target_delta)


def test_a_round_that_was_asked_for_again_after_the_backup_counts_twice(world):
    world.register()
    world.backup()
    world.round(1)
    world.restore()
    (signed,) = world.accountant.reserve("run", 1, [Ask("a", EVENT)]).granted
    assert len(world.reconcile().imported) == 1
    assert len(world.accountant.spent("run", "a").events) == 2
    assert world.accountant.reserve("run", 1, [Ask("a", EVENT)]).granted == (signed,)


def test_what_began_and_was_taken_for_voided_counts_again(world):
    world.register()
    reservation_id = world.round(1, commit=False)
    world.backup()
    with Ledger(world.folder / "server.sqlite") as ledger:
        ledger.append("void", "run", {"reservation_id": reservation_id, "refusal": None})
    assert world.accountant.spent("run", "a").events == ()
    assert world.reconcile() == Reconciled((), (reservation_id,))
    assert world.accountant.spent("run", "a").events == (EVENT,)


def test_nothing_is_taken_back_because_a_list_is_shorter(world):
    world.register()
    world.round(1)
    old = world.guard.history(world.coordinator.public_key)
    world.round(2)
    truth = world.accountant.spent("run", "a")
    assert world.reconcile(old) == Reconciled((), ())
    assert world.reconcile(world.forge(begun=())) == Reconciled((), ())
    assert world.accountant.spent("run", "a") == truth


def test_contradictions_and_forgeries_stop_and_write_nothing(world):
    world.register()
    world.round(1)
    head = world.accountant.head()
    history = world.guard.history(world.coordinator.public_key).history
    begun, charged = history.begun[0], history.charged[0]
    cheaper = replace(begun, reservation=replace(begun.reservation, event=SampledGaussian(2.0, 0.01, 100)))
    forged = [
        world.forge(begun=(cheaper,)),
        world.forge(begun=(replace(begun, participation=1),)),
        world.forge(begun=(begun, begun)),
        world.forge(begun=(replace(begun, reservation=replace(begun.reservation, run_id="other")),)),
        world.forge(begun=(replace(begun, reservation=replace(begun.reservation, client="b")),)),
        world.forge(charged=(replace(charged, envelope=Envelope((EVENT,))),)),
        world.forge(charged=(replace(charged, dataset="labs"),), begun=()),
        world.forge(coordinator=SigningKey.generate().public_key),
        SignedHistory.sign(SigningKey.generate(), history),
    ]
    for signed in forged:
        with pytest.raises(Refused):
            world.reconcile(signed)
    assert world.accountant.head() == head


def test_the_list_reads_back_and_speaks_of_one_coordinator_only(world):
    world.register()
    world.round(1)
    history = world.guard.history(world.coordinator.public_key).history
    assert ClientHistory.from_json(history.to_json()) == history
    other = world.guard.history(SigningKey.generate().public_key).history
    assert (other.charged, other.begun, other.head) == ((), (), "0" * 64)
    with pytest.raises(InvalidInput, match="malformed"):
        ClientHistory.from_json({"charged": [{}]})
