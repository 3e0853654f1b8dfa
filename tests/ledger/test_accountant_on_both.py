"""The accountant on both kinds of storage: two processes' worth of accountants, one truth."""

import threading

import pytest

from common.charge import charge
from common.errors import BudgetExhausted
from common.messages import Envelope
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Ask, Budget, EmbeddedAccountant, Outcome, Registration

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
KEY, CLIENT = SigningKey.generate(), SigningKey.generate()
EACH = charge([EVENT] * 5, relation="add_remove", delta=1e-6).epsilon


def registration(**budget):
    return Registration("notes", Budget(3.0, 1e-6, **budget), Envelope((EVENT,) * 5), CLIENT.public_key)


def in_threads(count, work):
    """Run ``work(number)`` in that many threads at once; the errors they raised."""
    errors = []

    def run(number):
        try:
            work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_ten_concurrent_runs_on_one_data_set_never_overspend(open_ledger):
    accountants = [EmbeddedAccountant(open_ledger(), KEY) for _ in range(10)]
    item = registration(lifetime_epsilon=3.5 * EACH, lifetime_delta=1e-4)
    errors = in_threads(10, lambda number: accountants[number].register(f"run-{number}", {"a": item}))
    assert len(errors) == 7
    assert all(isinstance(error, BudgetExhausted) for error in errors)


def test_concurrent_callers_of_one_run_take_each_place_once(open_ledger):
    accountants = [EmbeddedAccountant(open_ledger(), KEY) for _ in range(4)]
    accountants[0].register("run", {"a": registration()})
    places = []

    def ask(number):
        for server_round in range(1, 6):
            answer = accountants[number].reserve("run", 10 * number + server_round, [Ask("a", EVENT)])
            places.extend(answer.participation.values())

    assert in_threads(4, ask) == []
    assert sorted(places) == [0, 1, 2, 3, 4]
    for accountant in accountants:
        spent = accountant.spent("run", "a")
        assert len(spent.events) == 5
        assert spent.epsilon == pytest.approx(EACH)


def test_a_round_is_the_same_after_a_restart(open_ledger):
    first = EmbeddedAccountant(open_ledger(), KEY)
    first.register("run", {"a": registration()})
    answer = first.reserve("run", 1, [Ask("a", EVENT)])
    rid = answer.granted[0].reservation.reservation_id
    first.sending("run", [rid])
    second = EmbeddedAccountant(open_ledger(), KEY)
    assert second.reserve("run", 1, [Ask("a", EVENT)]) == answer
    assert [item.sending for item in second.open("run")] == [True]
    second.commit("run", {rid: Outcome.UNKNOWN})
    assert first.open("run") == ()
    assert first.head() == second.head()
