"""What the coordinator's accountant allows, and what it never forgets."""

import math

import pytest

from common.charge import charge
from common.errors import BudgetExhausted, InvalidInput, LedgerCorrupt, Refused
from common.ledger import Ledger
from common.messages import Envelope, Refusal, RefusalReason
from common.privacy import PLDAccountant, SampledGaussian
from common.signing import SigningKey, verify
from server.accountant import Ask, EmbeddedAccountant, Outcome, Registration

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
STRONGER = SampledGaussian(noise_multiplier=0.9, sample_rate=0.01, steps=100)


def reserve(accountant, server_round=1, client="a", event=EVENT, attempt=1, run="run"):
    answer = accountant.reserve(run, server_round, [Ask(client, event, attempt)])
    return answer.granted[0] if answer.granted else answer.denied[0]


def refusal_of(key, signed, reason=RefusalReason.POLICY, voiding=True):
    return Refusal.sign(key, signed.reservation.reservation_id, "0" * 64, reason, voiding)


def epsilon_of(*events):
    return PLDAccountant().compose_all(events).epsilon(1e-5)


def test_a_reservation_is_signed_and_counts_at_once(accountant, registration):
    accountant.register("run", {"a": registration()})
    signed = reserve(accountant)
    verify(accountant.public_key, "reservation", signed.reservation.to_json(), signed.signature)
    verify(accountant.public_key, "head", {"head": signed.accountant_head}, signed.accountant_head_signature)
    assert signed.accountant_head == accountant.head()
    spent = accountant.spent("run", "a")
    assert spent.events == (EVENT,)
    assert spent.epsilon == pytest.approx(epsilon_of(EVENT), rel=1e-9)
    assert spent.epsilon_rdp >= spent.epsilon
    assert (spent.target_epsilon, spent.target_delta) == (2.0, 1e-5)
    assert accountant.participations("run", "a") == 1
    (line,) = accountant.attested("run", "a")
    assert (line.reservation_id, line.participation, line.event) == (signed.reservation.reservation_id, 0, EVENT)


def test_the_same_request_is_answered_with_the_same_reservation(accountant, reopen, registration):
    accountant.register("run", {"a": registration()})
    first = reserve(accountant)
    assert reserve(accountant) == first
    assert reserve(reopen()) == first
    with pytest.raises(Refused, match="used for another event"):
        reserve(accountant, event=SampledGaussian(2.0, 0.01, 100))
    assert accountant.participations("run", "a") == 1


def test_an_exhausted_client_is_named_and_the_others_go_on(accountant, registration):
    accountant.register("run", {"a": registration(rounds=1), "b": registration(rounds=2)})
    assert len(accountant.reserve("run", 1, [Ask("a", EVENT), Ask("b", EVENT)]).granted) == 2
    answer = accountant.reserve("run", 2, [Ask("a", EVENT), Ask("b", EVENT)])
    assert [signed.reservation.client for signed in answer.granted] == ["b"]
    (denial,) = answer.denied
    assert (denial.client, denial.reason) == ("a", "budget")
    assert denial.spent == pytest.approx(epsilon_of(EVENT), rel=1e-9)
    assert denial.asked == pytest.approx(epsilon_of(EVENT, EVENT), rel=1e-6)
    assert denial.left == pytest.approx(2.0 - denial.spent)
    assert list(answer.participation.values()) == [1]


@pytest.mark.parametrize(
    "event",
    [STRONGER, SampledGaussian(1.0, 0.02, 100), SampledGaussian(1.0, 0.01, 101)],
    ids=["less-noise", "more-records", "more-steps"],
)
def test_an_event_outside_the_envelope_is_denied_and_costs_nothing(accountant, registration, event):
    accountant.register("run", {"a": registration()})
    head = accountant.head()
    assert reserve(accountant, event=event).reason == "envelope"
    assert accountant.head() == head
    assert accountant.spent("run", "a").events == ()


def test_an_envelope_that_does_not_fit_is_refused_for_all(accountant, registration):
    head = accountant.head()
    with pytest.raises(BudgetExhausted) as caught:
        accountant.register("run", {"a": registration(), "b": registration(rounds=3, target_epsilon=0.1)})
    assert caught.value.client == "b"
    assert caught.value.asked > 0.1
    assert accountant.head() == head
    with pytest.raises(Refused, match="not registered"):
        reserve(accountant)


def test_registering_again_changes_nothing_and_otherwise_is_refused(accountant, reopen, registration):
    accountant.register("run", {"a": registration()})
    head = accountant.head()
    reopen().register("run", {"a": registration()})
    assert accountant.head() == head
    for other in (registration(rounds=4), registration(dataset="labs"), registration(target_epsilon=3.0)):
        with pytest.raises(Refused, match="registered with another"):
            accountant.register("run", {"a": other})


@pytest.mark.parametrize(
    "budget", [{"target_epsilon": -1.0}, {"target_delta": 1.0}, {"target_epsilon": math.nan}, {"lifetime_delta": 0.0}]
)
def test_a_budget_out_of_range_is_invalid(accountant, registration, budget):
    with pytest.raises(InvalidInput):
        accountant.register("run", {"a": registration(**budget)})


@pytest.mark.parametrize("outcome", list(Outcome))
def test_whatever_became_of_it_what_was_sent_is_spent(accountant, reopen, registration, outcome):
    accountant.register("run", {"a": registration()})
    signed = reserve(accountant)
    rid = signed.reservation.reservation_id
    accountant.sending("run", [rid])
    accountant.commit("run", {rid: outcome})
    assert reopen().spent("run", "a").events == (EVENT,)
    assert reopen().open("run") == ()
    head = accountant.head()
    accountant.commit("run", {rid: outcome})
    assert accountant.head() == head


def test_the_heads_of_replies_are_kept(accountant, tmp_path, registration):
    accountant.register("run", {"a": registration()})
    rid = reserve(accountant).reservation.reservation_id
    accountant.commit("run", {rid: Outcome.REPLIED}, client_heads={rid: "e" * 64, "another": "f" * 64})
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        (line,) = ledger.entries(kind="commit")
    assert line.body == {"outcomes": {rid: "replied"}, "client_heads": {rid: "e" * 64}}


def test_open_reservations_are_found_after_a_restart_with_their_mark(accountant, reopen, registration):
    accountant.register("run", {"a": registration(), "b": registration()})
    first, second = reserve(accountant), reserve(accountant, client="b")
    accountant.sending("run", [first.reservation.reservation_id])
    found = {item.signed.reservation.client: item for item in reopen().open("run")}
    assert found["a"].sending
    assert not found["b"].sending
    assert (found["a"].signed, found["b"].signed) == (first, second)
    assert reopen().spent("run", "b").events == (EVENT,)


def test_what_was_never_sent_can_be_taken_back_and_its_place_is_used_again(accountant, registration):
    accountant.register("run", {"a": registration(rounds=1)})
    signed = reserve(accountant)
    accountant.void("run", signed.reservation.reservation_id)
    assert accountant.spent("run", "a").epsilon == 0
    with pytest.raises(Refused, match="voided"):
        reserve(accountant)
    assert accountant.next_attempt("run", 1, "a") == 2
    again = reserve(accountant, attempt=2)
    assert accountant.next_attempt("run", 1, "a") == 2
    assert accountant.next_attempt("run", 2, "a") == 1
    assert again.reservation.reservation_id != signed.reservation.reservation_id
    assert accountant.participations("run", "a") == 1


def test_what_may_have_been_sent_is_given_back_only_by_a_voiding_signature(accountant, registration, client_key):
    accountant.register("run", {"a": registration()})
    signed, other = reserve(accountant), reserve(accountant, server_round=2)
    rid = signed.reservation.reservation_id
    accountant.sending("run", [rid])
    forged = Refusal(rid, "0" * 64, RefusalReason.POLICY, True, refusal_of(client_key, signed, voiding=False).signature)
    for refusal in (
        None,
        refusal_of(client_key, signed, voiding=False),
        refusal_of(client_key, signed, RefusalReason.BUSY),
        refusal_of(client_key, signed, RefusalReason.USED),
        refusal_of(SigningKey.generate(), signed),
        refusal_of(client_key, other),
        forged,
    ):
        with pytest.raises(Refused):
            accountant.void("run", rid, refusal)
    assert len(accountant.spent("run", "a").events) == 2
    accountant.void("run", rid, refusal_of(client_key, signed))
    accountant.void("run", rid, refusal_of(client_key, signed))
    assert len(accountant.spent("run", "a").events) == 1


def test_train_then_void_does_not_give_back_what_was_committed(accountant, registration, client_key):
    accountant.register("run", {"a": registration()})
    signed = reserve(accountant)
    rid = signed.reservation.reservation_id
    accountant.commit("run", {rid: Outcome.REPLIED})
    with pytest.raises(Refused, match="stays spent"):
        accountant.void("run", rid, refusal_of(client_key, signed))


def test_a_reply_after_a_void_counts_again(accountant, registration):
    accountant.register("run", {"a": registration()})
    rid = reserve(accountant).reservation.reservation_id
    accountant.void("run", rid)
    with pytest.raises(Refused, match="closed"):
        accountant.sending("run", [rid])
    accountant.commit("run", {rid: Outcome.LATE})
    assert accountant.spent("run", "a").events == (EVENT,)


def test_a_reservation_belongs_to_its_run(accountant, registration):
    accountant.register("run", {"a": registration()})
    accountant.register("other", {"a": registration()})
    rid = reserve(accountant).reservation.reservation_id
    for call in (
        lambda: accountant.sending("other", [rid]),
        lambda: accountant.commit("other", {rid: Outcome.REPLIED}),
        lambda: accountant.void("other", rid),
        lambda: accountant.void("run", "unknown"),
    ):
        with pytest.raises(Refused, match="has no reservation"):
            call()


def test_malformed_asks_are_invalid_and_write_nothing(accountant, registration):
    accountant.register("run", {"a": registration()})
    head = accountant.head()
    with pytest.raises(InvalidInput):
        accountant.reserve("run", 0, [Ask("a", EVENT)])
    with pytest.raises(InvalidInput):
        accountant.reserve("run", 1, [Ask("a", EVENT), Ask("a", EVENT, 2)])
    with pytest.raises(InvalidInput):
        accountant.reserve("run", 1, [Ask("a", EVENT, 0)])
    with pytest.raises(Refused, match="no event was asked"):
        accountant.reserve("run", 1, [Ask("a", None)])
    assert accountant.head() == head


def test_a_run_without_privacy_is_counted_as_infinite(accountant, client_key):
    accountant.register("run", {"a": Registration("notes", None, Envelope(()), client_key.public_key)})
    assert accountant.spent("run", "a").epsilon == 0
    reserve(accountant, event=None)
    assert accountant.spent("run", "a").epsilon == math.inf
    with pytest.raises(Refused, match="without privacy"):
        reserve(accountant, server_round=2)


def test_a_lifetime_budget_is_the_sum_of_envelopes_over_runs(accountant, reopen, registration):
    one = charge([EVENT] * 3, relation="add_remove", delta=1e-5).epsilon
    lifetime = {"target_epsilon": one * 1.01, "lifetime_epsilon": 2.5 * one, "lifetime_delta": 1e-4}
    accountant.register("run-1", {"a": registration(**lifetime)})
    reopen().register("run-2", {"a": registration(target_epsilon=one * 1.01)})
    with pytest.raises(BudgetExhausted) as caught:
        accountant.register("run-3", {"a": registration(target_epsilon=one * 1.01)})
    assert caught.value.spent == pytest.approx(2 * one, rel=1e-6)
    assert caught.value.target == 2.5 * one
    accountant.register("run-3", {"b": registration()})
    accountant.register("run-4", {"a": registration(dataset="labs")})
    accountant.register("run-2", {"a": registration(target_epsilon=one * 1.01)})


def test_a_lifetime_bounds_the_sum_of_deltas_too(accountant, registration):
    accountant.register("run-1", {"a": registration(lifetime_delta=1.5e-5)})
    with pytest.raises(Refused, match="sum of δ"):
        accountant.register("run-2", {"a": registration()})


def test_data_sets_of_one_group_share_one_lifetime_even_later(accountant, registration):
    one = charge([EVENT] * 3, relation="add_remove", delta=1e-5).epsilon
    accountant.register("run-1", {"a": registration(dataset="notes")})
    accountant.register("run-2", {"a": registration(dataset="labs", group="patients")})
    accountant.register("run-3", {"a": registration(dataset="notes", group="patients")})
    with pytest.raises(BudgetExhausted) as caught:
        accountant.register("run-4", {"a": registration(dataset="labs", lifetime_epsilon=3.5 * one)})
    assert caught.value.spent == pytest.approx(3 * one, rel=1e-6)


def test_a_thousand_clients_are_reserved_in_one_transaction(accountant, registration):
    names = [f"clinic-{index}" for index in range(1000)]
    accountant.register("run", {name: registration() for name in names})
    answer = accountant.reserve("run", 1, [Ask(name, EVENT) for name in names])
    assert len(answer.granted) == 1000
    ids = [signed.reservation.reservation_id for signed in answer.granted]
    assert len(set(ids)) == 1000
    accountant.sending("run", ids)
    accountant.commit("run", dict.fromkeys(ids, Outcome.REPLIED))
    assert accountant.open("run") == ()


def test_a_changed_ledger_stops_the_accountant(tmp_path, accountant, reopen, registration):
    accountant.register("run", {"a": registration()})
    with Ledger(tmp_path / "ledger.sqlite") as ledger, ledger.exclusive() as connection:
        connection.exec_driver_sql("DROP TRIGGER ledger_entries_no_update")
        connection.exec_driver_sql("UPDATE ledger_entries SET body = replace(body, '2.0', '9.0')")
    with pytest.raises(LedgerCorrupt):
        reopen()


def test_lines_that_the_accountant_never_wrote_stop_it(tmp_path, accountant_key):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append("gift", "run", {"epsilon": -5})
        with pytest.raises(LedgerCorrupt, match="makes no sense"):
            EmbeddedAccountant(ledger, accountant_key)
