"""Ten concurrent runs on one data set, interleaved, repeated and restarted in every order: never overspent."""

import shutil
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from common.charge import charge
from common.errors import BudgetExhausted, Refused
from common.ledger import Ledger
from common.messages import Envelope, Refusal, RefusalReason
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Ask, Budget, EmbeddedAccountant, Outcome, Registration

EVENTS = (SampledGaussian(1.0, 0.02, 100), SampledGaussian(1.3, 0.02, 100), SampledGaussian(1.0, 0.01, 50))
KEY, CLIENT = SigningKey.generate(), SigningKey.generate()
RUNS = [f"run-{number}" for number in range(10)]
LIFETIME = 4.0
runs = st.sampled_from(RUNS)


def epsilon(events):
    return charge(events, relation="add_remove", delta=1e-6).epsilon


class Spending(RuleBasedStateMachine):
    """Two processes' accountants on one ledger, beside the plainest possible book."""

    database = None
    """On PostgreSQL: makes a context with the URL of an empty database."""

    @initialize()
    def open_ledger(self):
        self.folder, self.stack = Path(tempfile.mkdtemp()), ExitStack()
        self.storage = self.folder / "ledger.sqlite"
        if self.database is not None:
            self.storage = self.stack.enter_context(self.database())
        self.accountants = [self.start(), self.start()]
        self.envelopes, self.held, self.sent, self.closed, self.revived = {}, {}, set(), {}, set()

    def start(self):
        return EmbeddedAccountant(Ledger(self.storage), KEY)

    def teardown(self):
        if hasattr(self, "accountants"):
            for accountant in self.accountants:
                accountant._ledger.close()
            self.stack.close()
            shutil.rmtree(self.folder)

    @rule(which=st.integers(0, 1))
    def restart(self, which):
        self.accountants[which]._ledger.close()
        self.accountants[which] = self.start()

    @rule(which=st.integers(0, 1), run=runs, event=st.sampled_from(EVENTS), rounds=st.integers(1, 3))
    def register(self, which, run, event, rounds):
        envelope = Envelope((event,) * rounds)
        budget = Budget(3.0, 1e-6, lifetime_epsilon=LIFETIME, lifetime_delta=1e-4)
        try:
            self.accountants[which].register(run, {"a": Registration("notes", budget, envelope, CLIENT.public_key)})
        except BudgetExhausted:
            spent = sum(epsilon(one.events) for one in self.envelopes.values())
            assert spent + epsilon(envelope.events) > LIFETIME or epsilon(envelope.events) > 3.0
        except Refused:
            assert self.envelopes[run] != envelope
        else:
            assert self.envelopes.setdefault(run, envelope) == envelope

    @rule(
        which=st.integers(0, 1),
        run=runs,
        number=st.integers(1, 4),
        event=st.sampled_from(EVENTS),
        attempt=st.integers(1, 2),
    )
    def reserve(self, which, run, number, event, attempt):
        known = self.held.get((run, number, attempt))
        try:
            answer = self.accountants[which].reserve(run, number, [Ask("a", event, attempt)])
        except Refused:
            assert run not in self.envelopes or known[1] != event or self.closed.get(known[0]) == "void"
            return
        for signed in answer.granted:
            reservation_id = signed.reservation.reservation_id
            assert known in (None, (reservation_id, event))
            self.held[run, number, attempt] = (reservation_id, event)

    @rule(which=st.integers(0, 1), request=st.data())
    def act(self, which, request):
        if not self.held:
            return
        run, number, attempt = request.draw(st.sampled_from(sorted(self.held)))
        reservation_id = self.held[run, number, attempt][0]
        accountant = self.accountants[which]
        action = request.draw(st.sampled_from(["sending", "commit", "void", "signed void", "forged void"]))
        try:
            if action == "sending":
                accountant.sending(run, [reservation_id])
                self.sent.add(reservation_id)
            elif action == "commit":
                accountant.commit(run, {reservation_id: request.draw(st.sampled_from(list(Outcome)))})
                if self.closed.get(reservation_id) == "void":  # a reply after a void: the truth is told, whatever it is
                    self.revived.add(run)
                self.closed[reservation_id] = "spent"
            else:
                key = {"void": None, "signed void": CLIENT, "forged void": KEY}[action]
                refusal = key and Refusal.sign(key, reservation_id, "0" * 64, RefusalReason.POLICY, voiding=True)
                accountant.void(run, reservation_id, refusal)
                assert self.closed.get(reservation_id) == "void" or action != "void" or reservation_id not in self.sent
                assert self.closed.get(reservation_id) == "void" or action != "forged void"
                assert self.closed.get(reservation_id) != "spent"
                self.closed[reservation_id] = "void"
        except Refused:
            assert action != "commit"

    @invariant()
    def every_witness_agrees_and_nothing_is_overspent(self):
        if not hasattr(self, "accountants"):
            return
        total = sum(epsilon(envelope.events) for envelope in self.envelopes.values())
        assert total <= LIFETIME
        for run, envelope in self.envelopes.items():
            counting = [
                event for (of, _, _), (rid, event) in self.held.items() if of == run and self.closed.get(rid) != "void"
            ]
            for accountant in self.accountants:
                spent = accountant.spent(run, "a")
                assert sorted(spent.events) == sorted(counting)
            assert run in self.revived or epsilon(counting) <= epsilon(envelope.events) * (1 + 1e-6) <= 3.0 * (1 + 1e-6)


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_ten_concurrent_runs_never_overspend_on_postgresql(postgres_database):
    class OnPostgres(Spending):
        database = staticmethod(postgres_database)

    run_state_machine_as_test(OnPostgres, settings=settings(max_examples=8, stateful_step_count=25, deadline=None))


def test_ten_threads_registering_at_once_never_exceed_the_lifetime(tmp_path):
    envelope = Envelope((EVENTS[0],))
    each = epsilon(envelope.events)
    budget = Budget(3.0, 1e-6, lifetime_epsilon=3.5 * each)
    accountants = [EmbeddedAccountant(Ledger(tmp_path / "ledger.sqlite"), KEY) for _ in range(10)]
    granted = []

    def register(number):
        try:
            item = Registration("notes", budget, envelope, CLIENT.public_key)
            accountants[number].register(f"run-{number}", {"a": item})
        except BudgetExhausted:
            return
        granted.append(number)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for accountant in accountants:
        accountant._ledger.close()
    assert len(granted) == 3
