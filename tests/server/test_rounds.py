"""The round loop against honest and hostile clients: whatever they answer, the ledger charges what was sent."""

from dataclasses import replace

import numpy as np
import pytest

from common.errors import BudgetExhausted, CloisterError, LedgerCorrupt, Refused, Unavailable
from common.messages import RefusalReason, Reply, Status, StatusCode, adapter_hash
from common.privacy import PLDAccountant
from common.signing import SigningKey, verify
from server.exchange import Exchange
from server.rounds import RoundLoop, keys_of

INITIAL_HASH_SHAPES = {"layer.lora_B": (4, 2), "other.lora_B": (3,)}


def pld(fed, name, rounds) -> float:
    """ε of the first ``rounds`` events of the client's envelope, by a fresh accountant."""
    client = fed.terms.client(name)
    events = client.envelope.events[:rounds]
    return PLDAccountant().compose_all(events).epsilon(client.target_delta) if events else 0.0


def reply(request, **changes) -> Reply:
    update = {name: np.full_like(array, 0.5) for name, array in request.adapter.items()}
    return replace(Reply(update, request.reservation.reservation.reservation_id, "0" * 64), **changes)


def test_honest_clients_train_to_the_end_and_pay_the_plds_epsilon(federation, trainer):
    fed = federation([trainer("a"), trainer("b")])
    done = fed.loop().run()
    assert [line["round"] for line in done.metrics] == [0, 1, 2, 3]
    for line in done.metrics:
        for name in "ab":
            assert line["epsilon"][name] == pytest.approx(pld(fed, name, line["round"]), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(done.adapter["layer.lora_B"], 1.5)  # three rounds of 0.5, fedavg at rate 1
    assert fed.outcomes("a") == ["replied"] * 3


def test_metrics_are_complete_after_every_round_not_only_at_the_end(federation, trainer):
    fed = federation([trainer("a")])
    fed.loop().run()
    assert [[line["round"] for line in metrics] for metrics in fed.written] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3],
    ]  # fmt: skip
    assert all(set(line) == {"round", "score", "loss", "epsilon", "seconds"} for line in fed.written[-1])


def test_what_is_sent_is_signed_reserved_and_marked_first(federation, trainer):
    one = trainer("a")
    fed = federation([one])

    def behave(request):
        verify(fed.coordinator.public_key, "plan", request.plan.to_json(), request.plan_signature)
        signed = request.reservation
        verify(fed.accountants_key.public_key, "reservation", signed.reservation.to_json(), signed.signature)
        held = fed.accountant.counting("run", "a")[-1]
        assert held.reservation == signed.reservation
        assert held.sending
        assert held.outcome is None
        assert request.plan.adapter_hash == adapter_hash(request.adapter)
        assert request.plan.participation == request.plan.server_round - 1
        return one.ordinary(request)

    one.behave = behave
    fed.loop().run()
    assert fed.outcomes("a") == ["replied"] * 3, "an assertion in the trainer would show as an error here"


BAD_REPLIES = {
    "nan": lambda r: reply(r, update={n: np.full_like(a, np.nan) for n, a in r.adapter.items()}),
    "infinite": lambda r: reply(r, update={n: np.full_like(a, np.inf) for n, a in r.adapter.items()}),
    "wrong shape": lambda r: reply(r, update={n: np.zeros((9, 9), np.float32) for n in r.adapter}),
    "wrong dtype": lambda r: reply(r, update={n: a.astype(np.float64) for n, a in r.adapter.items()}),
    "a tensor missing": lambda r: reply(r, update=dict(list(r.adapter.items())[:1])),
    "a tensor more": lambda r: reply(r, update=r.adapter | {"records": np.ones(3, np.float32)}),
    "another reservation": lambda r: reply(r, reservation_id="f" * 32),
    "no reservation": lambda r: reply(r, reservation_id=""),
}


@pytest.mark.parametrize("behave", list(BAD_REPLIES.values()), ids=list(BAD_REPLIES))
def test_a_reply_that_does_not_fit_is_left_out_and_charged(federation, trainer, behave):
    fed = federation([trainer("a"), trainer("bad", behave)], rounds=2)
    done = fed.loop().run()
    np.testing.assert_allclose(done.adapter["layer.lora_B"], 1.0, err_msg="only the honest client's updates count")
    assert fed.outcomes("bad") == ["error"] * 2
    assert fed.spent("bad").epsilon == pytest.approx(pld(fed, "bad", 2), rel=1e-9)
    assert {one[1:3] for one in fed.heard.answers} == {("a", "replied"), ("bad", "error")}


@pytest.mark.parametrize(
    ("code", "outcome"), [("lost", "lost"), ("busy", "error"), ("unavailable", "error"), ("ready", "error")]
)
def test_a_status_is_charged(federation, trainer, code, outcome):
    fed = federation([trainer("a"), trainer("bad", lambda r: Status(StatusCode(code)))], rounds=2)
    fed.loop().run()
    assert fed.outcomes("bad") == [outcome] * 2
    assert fed.spent("bad").epsilon == pytest.approx(pld(fed, "bad", 2), rel=1e-9)


def test_an_exception_is_charged(federation, trainer):
    def behave(request):
        raise MemoryError("[/red] a patient's name")

    fed = federation([trainer("a"), trainer("bad", behave)], rounds=2)
    fed.loop().run()
    assert fed.outcomes("bad") == ["error"] * 2
    assert fed.spent("bad").epsilon == pytest.approx(pld(fed, "bad", 2), rel=1e-9)


def test_a_timeout_is_charged(federation, trainer):
    fed = federation([trainer("a"), trainer("bad")], rounds=1)

    class Never(Exchange):
        def _wait(self, identity, deadline):
            found = super()._wait(identity, deadline)
            is_train = found is not None and not found.has_error() and "reply" in found.content.config_records
            return None if is_train and found.metadata.src_node_id == 2 else found

    exchange = Never(fed.exchange()._grid)
    exchange.describe(2, 5.0)
    fed.loop(exchange=exchange).run()
    assert fed.outcomes("bad") == ["timeout"]
    assert fed.spent("bad").epsilon == pytest.approx(pld(fed, "bad", 1), rel=1e-9)


def test_a_signed_voiding_refusal_gives_the_round_back(federation, trainer):
    bad = trainer("bad")
    bad.behave = lambda request: bad.refuse(request, RefusalReason.POLICY, voiding=True)
    fed = federation([trainer("a"), bad], rounds=2)
    fed.loop().run()
    assert fed.outcomes("bad") == []
    assert fed.spent("bad").epsilon == 0.0
    assert fed.spent("a").epsilon == pytest.approx(pld(fed, "a", 2), rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "step", "lr-matched"])
def test_a_round_given_back_does_not_end_a_run_whose_noise_changes(federation, trainer, schedule):
    """The next round takes the free place of the list; where that asks for more noise than its own, it gets more."""
    shy = trainer("shy")

    def behave(request):
        if request.plan.server_round == 2:
            return shy.refuse(request, RefusalReason.POLICY, voiding=True)
        return shy.ordinary(request)

    shy.behave = behave
    settings = {"noise-schedule": schedule, "noise-every": 1, "server-schedule": "linear"}
    fed = federation([trainer("a"), shy], rounds=5, **settings)
    fed.loop().run()
    envelope = fed.terms.client("shy").envelope
    held = fed.accountant.attested("run", "shy")
    assert [(one.server_round, one.participation) for one in held] == [(1, 0), (3, 1), (4, 2), (5, 3)]
    assert all(envelope.allows(one.participation, one.event) for one in held)
    rounds = (0, 2, 3, 4) if schedule == "lr-matched" else (0, 1, 2, 3)  # its noise rises: each round keeps its own
    assert [one.event for one in held] == [envelope.events[place] for place in rounds]
    assert not fed.heard.denials


def test_after_a_voided_round_the_client_takes_the_same_place_of_its_envelope_again(federation, trainer):
    shy = trainer("shy")

    def behave(request):
        if request.plan.server_round == 1:
            return shy.refuse(request, RefusalReason.POLICY, voiding=True)
        return shy.ordinary(request)

    shy.behave = behave
    fed = federation([trainer("a"), shy])
    fed.loop().run()
    assert [request.plan.participation for request in shy.seen] == [0, 0, 1]
    assert fed.spent("shy").epsilon == pytest.approx(pld(fed, "shy", 2), rel=1e-9)


NOT_VOIDING = {
    "by another key": lambda t, r: t.refuse(r, RefusalReason.POLICY, True, key=SigningKey.generate()),
    "unsigned": lambda t, r: replace(t.refuse(r, RefusalReason.POLICY, True), signature=""),
    "of another reservation": lambda t, r: replace(t.refuse(r, RefusalReason.POLICY, True), reservation_id="f" * 32),
    "of another request": lambda t, r: replace(t.refuse(r, RefusalReason.POLICY, True), request_hash="f" * 64),
    "made voiding afterwards": lambda t, r: replace(t.refuse(r, RefusalReason.POLICY, False), voiding=True),
    "not voiding": lambda t, r: t.refuse(r, RefusalReason.POLICY, False),
    "busy": lambda t, r: t.refuse(r, RefusalReason.BUSY, True),
    "used": lambda t, r: t.refuse(r, RefusalReason.USED, True),
}


@pytest.mark.parametrize("make", list(NOT_VOIDING.values()), ids=list(NOT_VOIDING))
def test_any_other_refusal_gives_nothing_back(federation, trainer, make):
    bad = trainer("bad")
    bad.behave = lambda request: make(bad, request)
    fed = federation([trainer("a"), bad], rounds=2)
    fed.loop().run()
    assert fed.outcomes("bad") == ["refused"] * 2
    assert fed.spent("bad").epsilon == pytest.approx(pld(fed, "bad", 2), rel=1e-9)


def test_a_signed_refusal_of_another_request_is_recognised(federation, trainer):
    """The client's own signature, over the right reservation but another request: nothing is given back."""
    bad = trainer("bad")

    def behave(request):
        from common.messages import Refusal

        return Refusal.sign(
            bad.key, request.reservation.reservation.reservation_id, "f" * 64, RefusalReason.POLICY, voiding=True
        )

    bad.behave = behave
    fed = federation([trainer("a"), bad], rounds=1)
    fed.loop().run()
    assert fed.outcomes("bad") == ["refused"]


def test_an_exhausted_client_leaves_and_the_run_goes_on(federation, trainer):
    settings = {"noise-multiplier": 0.8, "rounds": 6}
    full = federation([trainer("a"), trainer("b")], **settings)
    target = full.terms.client("b").target_epsilon * 0.9
    full.ledger.close()
    fed = federation(
        [trainer("a"), trainer("b")], clients={"b": {"target-epsilon": target, "noise-multiplier": 0.8}}, **settings
    )
    places = len(fed.terms.client("b").envelope.events)
    assert 0 < places < 6
    done = fed.loop().run()
    assert [line["round"] for line in done.metrics] == list(range(7))
    assert len(fed.trainers["b"].seen) == places
    assert len(fed.trainers["a"].seen) == 6
    assert fed.heard.denials == [(places + 1, "b")], "it is told once, and not asked again"
    assert fed.spent("b").epsilon <= target
    assert fed.spent("b").epsilon == pytest.approx(pld(fed, "b", places), rel=1e-9)


def test_everybody_may_leave_and_the_adapter_stays(federation, trainer):
    full = federation([trainer("a")], **{"noise-multiplier": 0.8, "rounds": 4})
    target = full.terms.client("a").target_epsilon * 0.8
    full.ledger.close()
    fed = federation([trainer("a")], **{"noise-multiplier": 0.8, "rounds": 4, "target-epsilon": target})
    places = len(fed.terms.client("a").envelope.events)
    done = fed.loop().run()
    np.testing.assert_allclose(done.adapter["other.lora_B"], 0.5 * places)
    assert len(done.metrics) == 5


def test_clients_per_round_take_turns_and_pay_for_their_own_rounds(federation, trainer):
    fed = federation([trainer(name) for name in "abc"], **{"rounds": 4, "clients-per-round": 2})
    fed.loop().run()
    for name in "abc":
        played = sum(name in hand for hand in fed.terms.participants)
        assert len(fed.trainers[name].seen) == played
        assert fed.spent(name).epsilon == pytest.approx(pld(fed, name, played), rel=1e-9)


def test_weights_are_those_of_the_terms(federation, trainer):
    def constant(value):
        return lambda r: reply(r, update={n: np.full_like(a, value) for n, a in r.adapter.items()})

    fed = federation(
        [trainer("a", constant(1.0), 1000), trainer("b", constant(5.0), 3000)], rounds=1, weights="declared"
    )
    done = fed.loop().run()
    np.testing.assert_allclose(done.adapter["other.lora_B"], 0.25 * 1.0 + 0.75 * 5.0)


def test_nobody_in_round_one_is_an_error_and_still_charged(federation, trainer):
    fed = federation([trainer("a", lambda r: Status(StatusCode.LOST))])
    with pytest.raises(Unavailable, match="round 1"):
        fed.loop().run()
    assert fed.spent("a").epsilon == pytest.approx(pld(fed, "a", 1), rel=1e-9)


def test_nobody_in_a_later_round_keeps_the_adapter(federation, trainer):
    one = trainer("a")
    one.behave = lambda r: one.ordinary(r) if r.plan.server_round == 1 else Status(StatusCode.LOST)
    fed = federation([one])
    done = fed.loop().run()
    np.testing.assert_allclose(done.adapter["other.lora_B"], 0.5)
    assert fed.outcomes("a") == ["replied", "lost", "lost"]


def test_an_update_that_overflows_stops_the_run_with_a_reason(federation, trainer):
    huge = lambda r: reply(r, update={n: np.full_like(a, 3e38) for n, a in r.adapter.items()})  # noqa: E731
    fed = federation([trainer("a", huge)], **{"server-learning-rate": 100.0})
    with pytest.raises(CloisterError, match="overflows"):
        fed.loop().run()


def test_without_privacy_there_is_no_epsilon(federation, trainer):
    fed = federation([trainer("a")], **{"no-privacy": True})
    done = fed.loop().run()
    assert all(line["epsilon"] is None for line in done.metrics)
    assert all(request.plan.event is None for request in fed.trainers["a"].seen)


def test_a_public_set_scores_where_it_is_due(federation, trainer):
    class Scored:
        score, loss = 0.5, 1.25

    fed = federation([trainer("a")], rounds=5)
    seen = []
    done = fed.loop(evaluate=lambda adapter: (seen.append(adapter), Scored)[1], evaluate_every=2).run()
    assert [line["score"] for line in done.metrics] == [0.5, None, 0.5, None, 0.5, 0.5]
    assert len(seen) == 4


def test_a_loss_that_overflowed_is_null_so_that_every_line_is_json(federation, trainer):
    class Scored:
        score, loss = 0.0, float("nan")

    done = federation([trainer("a")], rounds=1).loop(evaluate=lambda adapter: Scored).run()
    assert [line["loss"] for line in done.metrics] == [None, None]
    assert [line["score"] for line in done.metrics] == [0.0, 0.0]


def test_an_initial_adapter_of_other_terms_is_refused(federation, trainer):
    fed = federation([trainer("a")])
    exchange = fed.exchange()
    with pytest.raises(Refused, match="initial adapter"):
        RoundLoop(
            terms=fed.terms, initial={"x": np.ones(2, np.float32)}, public_keys=keys_of(fed.descriptions),
            exchange=exchange, accountant=fed.accountant, key=fed.coordinator, folder=fed.folder,
        )  # fmt: skip


def test_an_envelope_above_its_target_is_never_begun(federation, trainer):
    fed = federation([trainer("a")])
    client = fed.terms.client("a")
    fed.terms = replace(fed.terms, clients=(replace(client, target_epsilon=client.target_epsilon / 2),))
    with pytest.raises(BudgetExhausted):
        fed.loop().run()
    assert fed.trainers["a"].seen == []


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["reserve", "sending", "train", "commit", "evaluate", "save"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loop_that_was_killed_goes_on_and_never_forgets_what_was_sent(federation, trainer, monkeypatch, moment, when):
    one = trainer("a")
    replies = {}
    begun = []

    def behave(request):  # a trainer keeps its replies: the same request gets the same answer
        key = request.request_hash
        if key not in replies:
            begun.append(request.reservation.reservation.reservation_id)
            replies[key] = one.ordinary(request)
        return replies[key]

    one.behave = behave
    # With a list of unlike events, asking again for the same round must give the same event.
    fed = federation([one, trainer("b")], **{"noise-schedule": "cosine" if when == "after" else "constant"})
    from server import checkpoint as checkpoints

    target, name = {
        "reserve": (fed.accountant, "reserve"),
        "sending": (fed.accountant, "sending"),
        "train": (one, "train"),
        "commit": (fed.accountant, "commit"),
        "evaluate": (RoundLoop, "_record"),
        "save": (checkpoints, "save"),
    }[moment]
    real, calls = getattr(target, name), []

    def deadly(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 + (moment in ("save", "evaluate")) and when == "before":
            raise Killed
        found = real(*arguments, **options)
        if len(calls) == 2 + (moment in ("save", "evaluate")):
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(target, name, deadly)
        with pytest.raises(Killed):
            fed.loop().run()
    fed.accountant = type(fed.accountant)(fed.ledger, fed.accountants_key)
    done = fed.loop().run()
    assert [line["round"] for line in done.metrics] == [0, 1, 2, 3]
    np.testing.assert_allclose(done.adapter["other.lora_B"], 1.5)
    counted = {held.reservation.reservation_id for held in fed.accountant.counting("run", "a")}
    assert set(begun) <= counted
    assert len(counted) == 3, "the same reservation is used again, so a kill costs nothing twice"
    assert fed.spent("a").epsilon == pytest.approx(pld(fed, "a", 3), rel=1e-9)
    epsilons = [line["epsilon"]["a"] for line in done.metrics]
    assert epsilons == sorted(epsilons)


def test_a_finished_run_is_not_trained_again(federation, trainer):
    fed = federation([trainer("a")])
    first = fed.loop().run()
    again = fed.loop().run()
    assert len(fed.trainers["a"].seen) == 3
    assert again.metrics == first.metrics
    np.testing.assert_array_equal(again.adapter["other.lora_B"], first.adapter["other.lora_B"])


def test_a_damaged_checkpoint_stops_the_run(federation, trainer):
    fed = federation([trainer("a")])
    fed.loop().run()
    path = fed.folder / "checkpoint.npz"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(LedgerCorrupt, match="damaged"):
        fed.loop().run()


def test_a_checkpoint_of_other_terms_stops_the_run(federation, trainer):
    fed = federation([trainer("a")])
    fed.loop().run()
    fed.terms = replace(fed.terms, learning_rate=0.25)
    with pytest.raises(LedgerCorrupt, match="other terms"):
        fed.loop().run()
