"""The coordinator's accountant: nothing is sent that was not reserved, and what was sent is spent.

Guarantees, each durable before the method returns:
    * the envelope of a run is charged as a whole before its first round, and must fit into the data set's budget;
    * a reservation lies inside the envelope, at a place that no other counting reservation holds;
    * after any crash the spent ε is never below the truth: a reservation counts from the moment it is written,
      and stops counting only when the client signed that it never trained, or when nothing was sent;
    * where an anchor is set, nothing is answered before it holds the ledger's head;
    * of two concurrent callers, threads or processes on one ledger, the second sees what the first wrote.

Decisions rest on ``server/book.py``, which is replayed from the verified ledger and follows other writers.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from common.accounts import Answer, Ask, Budget, Denial, OpenReservation, Outcome, Reconciled, Registration, Spent
from common.anchor import Anchor, check_anchored
from common.certificate import Attested
from common.charge import charge
from common.errors import BudgetExhausted, InvalidInput, Refused
from common.history import SignedHistory
from common.ledger import GENESIS, Draft, Entry, Ledger
from common.messages import Refusal, Reservation, SignedReservation
from common.privacy import SampledGaussian
from common.signing import SigningKey, canonical
from server import imports
from server.book import Account, Book, Held

__all__ = [
    "Answer",
    "Ask",
    "Budget",
    "Denial",
    "EmbeddedAccountant",
    "OpenReservation",
    "Outcome",
    "Registration",
    "Spent",
]


class EmbeddedAccountant:
    """The accountant in the coordinator's own process.

    Args:
        ledger: verified line by line here; several accountants may share one storage.
        key: signs reservations and heads.
        anchor: outside this machine; holds the head after every change. One accountant writes to it.

    Raises:
        LedgerCorrupt: the ledger does not verify, or is older than its anchor.
        Unavailable: the anchor cannot be asked.
    """

    def __init__(self, ledger: Ledger, key: SigningKey, *, anchor: Anchor | None = None) -> None:
        if anchor is not None:
            check_anchored(ledger, anchor)
        self._ledger, self._anchor, self._anchored = ledger, anchor, ""
        self._key = key
        self.public_key = key.public_key
        self._lock = threading.RLock()
        self._book = Book()
        self._seq, self._head = 0, GENESIS
        with self._reading():
            pass

    def register(self, run_id: str, registrations: Mapping[str, Registration]) -> None:
        """Charge each client's envelope to its data set, all or none; the same registration again changes nothing.

        Raises:
            BudgetExhausted: an envelope does not fit into the run's target, or into what the lifetime budget leaves.
            Refused: the run is known with another registration of that client.
            InvalidInput: a budget out of range.
        """
        epsilons = {client: _envelope_epsilon(client, item) for client, item in registrations.items()}
        with self._writing() as book:
            known = book.runs.get(run_id, {})
            drafts = []
            for client, registration in registrations.items():
                if client in known:
                    if known[client].registration != registration:
                        raise Refused(f"run {run_id}: {client} is registered with another budget, envelope or key")
                    continue
                _check_lifetime(book, client, registration, epsilons[client])
                epsilon = epsilons[client] if math.isfinite(epsilons[client]) else None
                body = {"client": client, "registration": registration.to_json(), "epsilon": epsilon}
                drafts.append(Draft("register", run_id, body, _key("register", run_id, client)))
            self._ledger.append_many(drafts)

    def reserve(self, run_id: str, server_round: int, asks: Sequence[Ask]) -> Answer:
        """One round's permissions, in one durable transaction; who has nothing left is named and left out.

        The same (run, round, client, attempt) with the same event is answered with the stored reservation.

        Raises:
            Refused: an unknown client, another event under a used attempt, or an attempt that was voided.
            InvalidInput: a client asked for twice, a round or attempt below 1.
        """
        _check_asks(server_round, asks)
        denied: list[Denial] = []
        with self._writing() as book:
            drafts: list[Draft] = []
            for ask in asks:
                account = _account(book, run_id, ask.client)
                if _is_answered(book, run_id, server_round, ask):
                    continue
                denial = _denial(account, ask)
                if denial is not None:
                    denied.append(denial)
                    continue
                drafts.append(_reservation_draft(run_id, server_round, ask, account))
            self._ledger.append_many(drafts)
        without = {denial.client for denial in denied}
        with self._reading() as book:
            held = [
                book.requests[run_id, server_round, ask.client, ask.attempt]
                for ask in asks
                if ask.client not in without
            ]
            signed = tuple(self._signed(one) for one in held)
            return Answer(signed, tuple(denied), {one.reservation.reservation_id: one.participation for one in held})

    def sending(self, run_id: str, reservation_ids: Iterable[str]) -> None:
        """Mark what is about to be sent; call it before the first byte leaves.

        Raises:
            Refused: a reservation is unknown, of another run, voided or already closed.
        """
        with self._writing() as book:
            fresh = []
            for reservation_id in reservation_ids:
                held = _held(book, run_id, reservation_id)
                if held.void or held.outcome is not None:
                    raise Refused(f"reservation {reservation_id} is closed; reserve a new attempt")
                if not held.sending:
                    fresh.append(reservation_id)
            if fresh:
                self._ledger.append("sending", run_id, {"reservations": fresh})

    def commit(
        self, run_id: str, outcomes: Mapping[str, Outcome], *, client_heads: Mapping[str, str] | None = None
    ) -> None:
        """Close reservations: each is spent with all its steps, whatever became of it.

        A commit of a voided reservation makes it count again: the larger spend is the truth.

        Args:
            run_id: the run.
            outcomes: what became of each reservation.
            client_heads: by reservation, the head that came with the reply; recorded, so that each client's chain is
                anchored in this one.
        """
        with self._writing() as book:
            fresh = {}
            for reservation_id, outcome in outcomes.items():
                held = _held(book, run_id, reservation_id)
                if held.void or held.outcome != Outcome(outcome):
                    fresh[reservation_id] = str(Outcome(outcome))
            if fresh:
                heads = {rid: head for rid, head in (client_heads or {}).items() if rid in fresh}
                self._ledger.append("commit", run_id, {"outcomes": fresh, "client_heads": heads})

    def void(self, run_id: str, reservation_id: str, refusal: Refusal | None = None) -> None:
        """Take a reservation back: with the client's signed, voiding refusal, or because nothing was ever sent.

        Raises:
            Refused: it may have been sent and the refusal is missing, not voiding, of another reservation, or not
                signed by the registered key; or the reservation was committed.
        """
        with self._writing() as book:
            held = _held(book, run_id, reservation_id)
            if held.void:
                return
            if held.outcome is not None:
                raise Refused(f"reservation {reservation_id} was committed as {held.outcome}: it stays spent")
            if refusal is not None:
                _check_voiding(book, held, refusal)
            elif held.sending:
                raise Refused(f"reservation {reservation_id} may have been sent: only its client can give it back")
            evidence = None if refusal is None else refusal_json(refusal)
            self._ledger.append("void", run_id, {"reservation_id": reservation_id, "refusal": evidence})

    def reconcile(self, signed: SignedHistory, *, public_key: str, coordinator: str) -> Reconciled:
        """Take over what a client's signed list holds and this book does not: it is spent. The larger spend is true.

        Args:
            signed: as the client sent it.
            public_key: the client's, known beforehand.
            coordinator: our coordinator's public key; a list for another says nothing here.

        Raises:
            Refused: another signature, another coordinator, or a conflict (one reservation or run, two contents);
                nothing was written, and nothing should be sent until it is understood.
        """
        signed.check(public_key)
        history = signed.history
        if history.coordinator != coordinator:
            raise Refused(f"{history.client}: this history is for another coordinator")
        with self._writing() as book:
            drafts = [*imports.missing_runs(book, history, public_key)]
            fresh, revived = imports.missing_reservations(book, history)
            drafts += fresh
            for run_id, ids in revived.items():
                drafts.append(Draft("commit", run_id, {"outcomes": dict.fromkeys(ids, str(Outcome.LATE))}))
            self._ledger.append_many(drafts)
        imported = tuple(draft.body["reservation"]["reservation_id"] for draft in fresh)
        return Reconciled(imported, tuple(rid for ids in revived.values() for rid in ids))

    def open(self, run_id: str) -> tuple[OpenReservation, ...]:
        """What has no outcome yet; after a restart, commit it as ``unknown`` (or void what was never sent)."""
        with self._reading() as book:
            accounts = book.runs.get(run_id, {}).values()
            every = [held for account in accounts for held in account.held if held.outcome is None and not held.void]
            return tuple(OpenReservation(self._signed(held), held.sending) for held in every)

    def spent(self, run_id: str, client: str) -> Spent:
        """The certified ε of everything reserved and not voided."""
        with self._reading() as book:
            account = _account(book, run_id, client)
            events = account.events()
            unprotected = len(account.spent()) > len(events)
            budget = account.registration.budget
        if budget is None:
            epsilon = math.inf if unprotected else 0.0
            return Spent(events, epsilon, epsilon, math.inf, 0.0)
        cost = charge(events, relation=budget.relation, delta=budget.target_delta)
        return Spent(events, cost.epsilon, cost.epsilon_rdp, budget.target_epsilon, budget.target_delta)

    def attested(self, run_id: str, client: str) -> tuple[Attested, ...]:
        """What counts for this client, as the certificate lists it."""
        with self._reading() as book:
            held = [(one.reservation, one.participation) for one in _account(book, run_id, client).spent()]
        return tuple(Attested(r.reservation_id, r.server_round, place, r.event) for r, place in held)

    def participations(self, run_id: str, client: str) -> int:
        """The place in the envelope that this client's next reservation will take (from 0).

        It equals the number of counting reservations, unless an earlier one was voided out of order.
        """
        with self._reading() as book:
            return _account(book, run_id, client).next_participation()

    def counting(self, run_id: str, client: str) -> tuple[Held, ...]:
        """Every reservation of the client that counts, in the order of reservation."""
        with self._reading() as book:
            return tuple(_account(book, run_id, client).spent())

    def next_attempt(self, run_id: str, server_round: int, client: str) -> int:
        """The attempt to ask for in that round: the first that was not voided (1 where nothing was asked yet).

        Asking for it again after a restart is answered with the stored reservation.
        """
        with self._reading() as book:
            attempt = 1
            while (held := book.requests.get((run_id, server_round, client, attempt))) is not None and held.void:
                attempt += 1
            return attempt

    def history(self, *, scope: str | None = None, after: int = 0) -> Iterator[Entry]:
        """The ledger's lines after line ``after``, of one run or of all."""
        return self._ledger.entries(scope=scope, after=after)

    def head(self) -> str:
        """The ledger's head."""
        return self._ledger.head()

    def signed_head(self) -> tuple[str, str]:
        """The ledger's head and the signature over it, as a statement of kind ``head``."""
        head = self.head()
        return head, self._key.sign("head", {"head": head})

    def _signed(self, held: Held) -> SignedReservation:
        signature = self._key.sign("reservation", held.reservation.to_json())
        return SignedReservation(held.reservation, signature, held.head, self._key.sign("head", {"head": held.head}))

    @contextmanager
    def _writing(self) -> Iterator[Book]:
        """The book as it stands, while nobody else can write; what is appended inside is durable afterwards."""
        with self._lock:
            with self._ledger.exclusive():
                self._catch_up()
                yield self._book
            self._keep_head()

    def _keep_head(self) -> None:
        """After the lines are durable and before anybody is answered; a call that failed just here is tried again."""
        if self._anchor is not None and (head := self._ledger.head()) != self._anchored:
            self._anchor.write(head)
            self._anchored = head

    @contextmanager
    def _reading(self) -> Iterator[Book]:
        with self._lock:
            self._catch_up()
            yield self._book

    def _catch_up(self) -> None:
        """Fold in the lines that were written since, by us or by others; each must continue the verified chain."""
        for entry in self._ledger.follow(seq=self._seq, head=self._head):
            self._book.apply(entry)
            self._seq, self._head = entry.seq, entry.hash


def refusal_json(refusal: Refusal) -> dict[str, object]:
    """A refusal with its signature, as evidence in the ledger."""
    body = Refusal.body(refusal.reservation_id, refusal.request_hash, refusal.reason, refusal.voiding)
    return {**body, "signature": refusal.signature}


def _key(*parts: str | int) -> str:
    """An idempotency key that no other parts can give."""
    return canonical(list(parts)).decode()


def _account(book: Book, run_id: str, client: str) -> Account:
    account = book.runs.get(run_id, {}).get(client)
    if account is None:
        raise Refused(f"run {run_id}: {client} is not registered")
    return account


def _held(book: Book, run_id: str, reservation_id: str) -> Held:
    held = book.reservations.get(reservation_id)
    if held is None or held.reservation.run_id != run_id:
        raise Refused(f"run {run_id} has no reservation {reservation_id}")
    return held


def _envelope_epsilon(client: str, registration: Registration) -> float:
    """The certified ε of the whole envelope, found to fit into the run's target."""
    budget = registration.budget
    if budget is None:
        return math.inf
    limits = {"target_epsilon": math.inf, "target_delta": 1, "lifetime_epsilon": math.inf, "lifetime_delta": 1}
    for name, limit in limits.items():
        value = getattr(budget, name)
        if value is not None and not 0 < value < limit:
            raise InvalidInput(f"{client}: {name} must be > 0 and < {limit:g}, got {value}")
    cost = charge(registration.envelope.events, relation=budget.relation, delta=budget.target_delta)
    if not cost.epsilon <= budget.target_epsilon:
        raise BudgetExhausted(client, spent=0.0, asked=cost.epsilon, target=budget.target_epsilon)
    return cost.epsilon


def _check_lifetime(book: Book, client: str, registration: Registration, epsilon: float) -> None:
    """Σε and Σδ over the envelopes of every run on these records, against the strictest lifetime registered."""
    earlier = list(book.related(client, registration.dataset, registration.group))
    budgets = [account.registration.budget for account in earlier] + [registration.budget]
    known = [budget for budget in budgets if budget is not None]
    limit = min((b.lifetime_epsilon for b in known if b.lifetime_epsilon is not None), default=math.inf)
    delta_limit = min((b.lifetime_delta for b in known if b.lifetime_delta is not None), default=math.inf)
    if limit == math.inf and delta_limit == math.inf:
        return
    spent = math.fsum(account.epsilon for account in earlier)
    delta = math.fsum(math.inf if budget is None else budget.target_delta for budget in budgets)
    if not spent + epsilon <= limit:
        raise BudgetExhausted(client, spent=spent, asked=spent + epsilon, target=limit)
    if not delta <= delta_limit:
        raise Refused(f"{client}: with this run the sum of δ would be {delta:g}, above the lifetime's {delta_limit:g}")


def _check_asks(server_round: int, asks: Sequence[Ask]) -> None:
    if server_round < 1 or any(ask.attempt < 1 for ask in asks):
        raise InvalidInput("rounds and attempts count from 1")
    if len({ask.client for ask in asks}) < len(asks):
        raise InvalidInput("a round asks each client once")


def _is_answered(book: Book, run_id: str, server_round: int, ask: Ask) -> bool:
    """Whether this very request was granted before."""
    held = book.requests.get((run_id, server_round, ask.client, ask.attempt))
    if held is None:
        return False
    if held.reservation.event != ask.event or held.void:
        raise Refused(
            f"{ask.client}: attempt {ask.attempt} of round {server_round} was used "
            f"{'and voided' if held.void else 'for another event'}; ask for the next attempt"
        )
    return True


def _denial(account: Account, ask: Ask) -> Denial | None:
    """None when the event may take the next place of the envelope."""
    budget = account.registration.budget
    if budget is None:
        if ask.event is not None:
            raise Refused(f"{ask.client} is registered without privacy, but an event was asked for")
        return None
    if ask.event is None:
        raise Refused(f"{ask.client} is registered with a budget, but no event was asked for")
    place = account.next_participation()
    envelope = account.registration.envelope
    if envelope.allows(place, ask.event) and (account.places_are_distinct() or _fits(account, ask.event, budget)):
        return None
    events, relation, delta = account.events(), budget.relation, budget.target_delta
    spent = charge(events, relation=relation, delta=delta).epsilon
    asked = charge((*events, ask.event), relation=relation, delta=delta).epsilon
    reason = "envelope" if place < len(envelope.events) else "budget"
    return Denial(ask.client, spent, asked, max(0.0, budget.target_epsilon - spent), reason)


def _fits(account: Account, event: SampledGaussian, budget: Budget) -> bool:
    """Whether the envelope's ε still covers everything; asked only after a reply that came for a voided reservation."""
    events = (*account.events(), event)
    return charge(events, relation=budget.relation, delta=budget.target_delta).epsilon <= account.epsilon


def _reservation_draft(run_id: str, server_round: int, ask: Ask, account: Account) -> Draft:
    dataset = account.registration.dataset
    reservation = Reservation(secrets.token_hex(16), run_id, server_round, ask.client, dataset, ask.attempt, ask.event)
    body = {"reservation": reservation.to_json(), "participation": account.next_participation()}
    return Draft("reserve", run_id, body, _key("reserve", run_id, server_round, ask.client, ask.attempt))


def _check_voiding(book: Book, held: Held, refusal: Refusal) -> None:
    reservation = held.reservation
    if not refusal.voiding or refusal.reservation_id != reservation.reservation_id:
        raise Refused(f"reservation {reservation.reservation_id}: this refusal does not give it back")
    refusal.check(_account(book, reservation.run_id, reservation.client).registration.public_key)
