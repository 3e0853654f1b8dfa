"""A client that lies about its update: the run goes on, the round is charged, and the adapter stays finite.

The relay, the round loop, the accountant and the guards are real; only what the bad client answers is not.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client.guard import Guard
from client.guarded import under_guard
from client.policy import DatasetPolicy, Policy
from client.relay import build_relay
from common.certificate import sign_part, verify_certificate
from common.charge import charge
from common.config import RunConfig
from common.errors import InvalidInput, Refused, Unavailable
from common.ledger import Ledger
from common.messages import Description, Status, StatusCode, adapter_hash
from common.recipe import recipe_of
from common.signing import SigningKey
from deploy.simulation.inprocess_grid import InProcessGrid
from server.accountant import EmbeddedAccountant
from server.app import HOME_VARIABLE, app
from server.deployed import RunFolder

INITIAL = {"layer.lora_B": np.zeros((3, 2), dtype=np.float32)}
SHAPES = {name: array.shape for name, array in INITIAL.items()}
RECIPE = recipe_of(RunConfig(), max_length=64, target_modules=["layer"], classes=())
RUN, ROUNDS = "0123456789abcdef", 3


class Client:
    """A trainer without a model: the real guard, and an update of ones."""

    def __init__(self, name, guard):
        self.name, self.guard, self.trained, self.replies = name, guard, 0, []

    def describe(self):
        return Description(
            self.name, self.name, self.guard.public_key, 1000, "b" * 64, SHAPES, tuple(INITIAL), adapter_hash(INITIAL),
            RECIPE,
        )  # fmt: skip

    def signed_list(self, request):
        return self.guard.signed_list(request)

    def signed_part(self, request):
        return self.guard.signed_part(request, code_digest="c" * 64)

    def train(self, request):
        known = len(self.replies)

        def learn():
            self.trained += 1
            return {name: np.ones_like(array) for name, array in INITIAL.items()}, None

        reply = under_guard(self.guard, request, learn, shapes=SHAPES)
        if self.trained == known:  # nothing was learned: refused, lost, or answered before
            return reply
        self.replies.append(reply)
        return self.answer(reply)

    def answer(self, reply):
        return reply


def not_a_number(client, reply):
    return replace(reply, update={"layer.lora_B": np.full((3, 2), np.nan, np.float32)})


def other_shape(client, reply):
    return replace(reply, update={"layer.lora_B": np.ones((2, 3), np.float32)})


def other_name(client, reply):
    return replace(reply, update={"layer.lora_A": np.ones((3, 2), np.float32)})


def of_another_round(client, reply):
    return client.replies[0] if len(client.replies) > 1 else replace(reply, reservation_id="0" * 32)


def a_hundred_times(client, reply):
    return replace(reply, update={name: 100 * array for name, array in reply.update.items()})


class World:
    def __init__(self, home, lie):
        self.home, self.folder = home, home / "runs" / RUN
        self.folder.mkdir(parents=True)
        (self.folder / "clients").write_text("2\n")
        (self.folder / "run.toml").write_text(
            f'rounds = {ROUNDS}\nserver-optimizer = "fedavg"\nserver-learning-rate = 1.0\n'
        )
        keys = {
            n: SigningKey.load_or_create(home / "keys" / f"{n}.key").public_key for n in ("coordinator", "accountant")
        }
        self.clients = {}
        for name in ("good", "bad"):
            policy = Policy(
                organisation=name,
                datasets={name: DatasetPolicy(declared_records=1000, target_epsilon=8.0)},
                min_noise_multiplier=0.1, max_sample_rate=0.5, max_steps_per_round=1, backbones=("b" * 64,),
                coordinator_keys=(keys["coordinator"],), accountant_keys=(keys["accountant"],),
            )  # fmt: skip
            self.clients[name] = Client(name, Guard(policy, home / f"{name}.sqlite", key=SigningKey.generate()))
        bad = self.clients["bad"]
        bad.answer = lambda reply: lie(bad, reply)

    def run(self):
        grid = InProcessGrid(build_relay(lambda context: self.clients[context.node_config["client"]]), ["good", "bad"])
        app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"run": RUN}))
        with np.load(self.folder / "adapter.npz") as file:
            return file["layer.lora_B"]

    def check_books(self):
        """Every round was charged once on both sides, for the liar as for the honest."""
        coordinator = SigningKey.load(self.home / "keys" / "coordinator.key").public_key
        verdict = verify_certificate(self.folder / "certificate.json")
        metrics = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        with Ledger(self.home / "ledger.sqlite", read_only=True) as ledger:
            accountant = EmbeddedAccountant(ledger, SigningKey.load(self.home / "keys" / "accountant.key"))
            for name, client in self.clients.items():
                own = client.guard.uses(coordinator, RUN)
                assert {use.reservation_id for use in own} == {
                    item.reservation_id for item in accountant.attested(RUN, name)
                }
                assert client.trained == len(own) == ROUNDS
                truth = charge([use.event for use in own], relation="add_remove", delta=1e-5).epsilon
                assert metrics[-1]["epsilon"][name] == pytest.approx(truth, rel=1e-9)
                assert verdict.epsilons[name].epsilon == pytest.approx(truth, rel=1e-9)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    made = []

    def make(lie):
        made.append(World(tmp_path, lie))
        return made[-1]

    yield make
    for one in made:
        for client in one.clients.values():
            client.guard.close()


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (not_a_number, "finite"), (other_shape, "shape"), (other_name, "lora_A"),
        (of_another_round, "another reservation"),
    ],
)  # fmt: skip
def test_an_unusable_update_is_charged_and_left_out(world, lie, says):
    one = world(lie)
    np.testing.assert_array_equal(one.run(), np.full((3, 2), float(ROUNDS), np.float32))
    one.check_books()
    assert says in (one.folder / "run.log").read_text()


def test_a_hundredfold_update_moves_the_average_and_no_book(world):
    """It is a valid message: what it costs is utility. Nothing here claims to withstand it."""
    one = world(a_hundred_times)
    np.testing.assert_allclose(one.run(), np.full((3, 2), ROUNDS * (1 + 100) / 2, np.float32))
    one.check_books()


def test_a_reply_given_twice_is_counted_once(world):
    one = world(lambda client, reply: reply)
    asked = one.clients["bad"].train

    def twice(request):
        first, second = asked(request), asked(request)
        assert adapter_hash(first.update) == adapter_hash(second.update)
        return second

    one.clients["bad"].train = twice
    np.testing.assert_array_equal(one.run(), np.full((3, 2), float(ROUNDS), np.float32))
    one.check_books()


def without_a_signature(client, request):
    return replace(client.guard.signed_part(request, code_digest="c" * 64), signature="")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(lambda client, request: Status(StatusCode.UNAVAILABLE), "silent"), (without_a_signature, "unusable")],
)
def test_a_client_that_signs_nothing_holds_the_certificate_up_until_it_is_given_up(world, answer, reason):
    """What it trained counts all the same, and the certificate says that this is the coordinator's word alone."""
    one = world(lambda client, reply: reply)
    bad = one.clients["bad"]
    bad.signed_part = lambda request: answer(bad, request)
    with pytest.raises(Unavailable, match=r"bad gave no signed part.*--without"):
        one.run()
    assert not (one.folder / "certificate.json").exists()
    folder = RunFolder(one.folder, one.home)
    with pytest.raises(InvalidInput, match="'nobody' is no client of this run; its clients are bad, good"):
        folder.leave_out(["nobody"])
    folder.leave_out(["bad"])
    np.testing.assert_array_equal(one.run(), np.full((3, 2), float(ROUNDS), np.float32))
    one.check_books()
    verdict = verify_certificate(one.folder / "certificate.json")
    assert [(absent.part.client, absent.reason) for absent in verdict.certificate.absent] == [("bad", reason)]
    assert "NOT ATTESTED by bad" in verdict.statement


def test_a_client_that_was_given_up_and_comes_back_signs_its_part(world):
    one = world(lambda client, reply: reply)
    bad = one.clients["bad"]
    bad.signed_part = lambda request: Status(StatusCode.UNAVAILABLE)
    with pytest.raises(Unavailable):
        one.run()
    RunFolder(one.folder, one.home).leave_out(["bad"])
    del bad.signed_part
    one.run()
    one.check_books()
    assert verify_certificate(one.folder / "certificate.json").certificate.absent == ()


def a_round_that_never_was(client, signed):
    made_up = replace(signed.part.rounds[0], reservation_id="0" * 32)
    return replace(signed.part, rounds=(*signed.part.rounds[:2], made_up))


def without_privacy(client, signed):
    return replace(signed.part, target_epsilon=None, rounds=(), envelope=replace(signed.part.envelope, events=()))


def more_noise_than_was_asked(client, signed):
    louder = replace(signed.part.rounds[0].event, noise_multiplier=50.0)
    return replace(
        signed.part,
        rounds=tuple(replace(item, event=louder) for item in signed.part.rounds),
        envelope=replace(signed.part.envelope, events=(louder,) * ROUNDS),
    )


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (a_round_that_never_was, "reservation 00000000000000000000000000000000"),
        (without_privacy, "of a run without privacy"),
        (more_noise_than_was_asked, "σ = 50"),
    ],
)
def test_a_client_whose_signed_part_contradicts_the_book_does_not_block_the_others(world, lie, says):
    """Its own key signs the lie. Nobody gains by it: the ε that is stated for it is at least that of the book."""
    one = world(lambda client, reply: reply)
    bad = one.clients["bad"]
    key, guard = SigningKey.generate(), bad.guard
    guard._key, guard.public_key = key, key.public_key
    bad.signed_part = lambda request: sign_part(key, lie(bad, guard.signed_part(request, code_digest="c" * 64)))
    with pytest.raises(Refused, match=r"bad's signed part contradicts this coordinator's book.*--without"):
        one.run()
    assert says in (one.folder / "run.log").read_text()
    assert not (one.folder / "certificate.json").exists()
    RunFolder(one.folder, one.home).leave_out(["bad"])
    one.run()
    verdict = verify_certificate(one.folder / "certificate.json")
    assert [(absent.part.client, absent.reason) for absent in verdict.certificate.absent] == [("bad", "contradicting")]
    assert verdict.private
    assert "for the records of good. CONTRADICTED by bad" in verdict.statement
    assert says in verdict.statement
    numbers, honest = verdict.epsilons["bad"], verdict.epsilons["good"]
    assert numbers.epsilon is None or numbers.epsilon >= honest.epsilon
    assert (numbers.epsilon is None) == (lie is without_privacy)


def test_a_part_that_lists_more_rounds_than_the_run_has_is_no_word_on_it(world):
    """However many events it signed, nothing is computed from them."""
    one = world(lambda client, reply: reply)
    bad = one.clients["bad"]
    key, guard = SigningKey.generate(), bad.guard
    guard._key, guard.public_key = key, key.public_key

    def long(request):
        part = guard.signed_part(request, code_digest="c" * 64).part
        return sign_part(key, replace(part, envelope=replace(part.envelope, events=part.envelope.events * 1000)))

    bad.signed_part = long
    with pytest.raises(Unavailable, match="bad gave no signed part"):
        one.run()
    assert "more rounds than the run" in (one.folder / "run.log").read_text()
