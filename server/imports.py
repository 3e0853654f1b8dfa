"""What a client's list holds that the coordinator's book lacks, as lines to write; and what contradicts it.

See ``common/history.py`` for why: a coordinator restored from an old backup must not spend twice what it forgot.
"""

from __future__ import annotations

import math

from common.accounts import Budget, Registration
from common.errors import Refused
from common.history import Begun, ChargedRun, ClientHistory
from common.ledger import Draft
from common.signing import canonical
from server.book import Book


def missing_runs(book: Book, history: ClientHistory, public_key: str) -> list[Draft]:
    """Registrations of runs that the book does not know.

    Raises:
        Refused: a run is known with another data set or envelope.
    """
    drafts = []
    for charged in history.charged:
        if charged.epsilon is not None and not charged.epsilon >= 0:
            raise Refused(f"{history.client}: its list contradicts itself at run {charged.run_id}")
        account = book.runs.get(charged.run_id, {}).get(history.client)
        if account is None:
            drafts.append(_registration(history.client, charged, public_key))
            continue
        known = account.registration
        private = known.budget is not None
        if (known.dataset, private) != (charged.dataset, charged.epsilon is not None) or (
            private and known.envelope != charged.envelope
        ):
            raise Refused(f"{history.client}: run {charged.run_id} has another data set or envelope there than here")
        if known.public_key != public_key:
            raise Refused(f"{history.client}: run {charged.run_id} is registered with another key")
    return drafts


def missing_reservations(book: Book, history: ClientHistory) -> tuple[list[Draft], dict[str, list[str]]]:
    """Lines for reservations that the book does not know, and, by run, ids that it holds for voided.

    Raises:
        Refused: a reservation is known with other contents, is listed twice, or belongs to no charged run.
    """
    runs = {(charged.run_id, charged.dataset): charged for charged in history.charged}
    fresh: list[Draft] = []
    revived: dict[str, list[str]] = {}
    seen: set[str] = set()
    for begun in history.begun:
        reservation = begun.reservation
        charged = runs.get((reservation.run_id, reservation.dataset))
        if (
            charged is None
            or reservation.client != history.client
            or reservation.reservation_id in seen
            or not _is_inside(begun, charged)
        ):
            raise Refused(f"{history.client}: its list contradicts itself at {reservation.reservation_id}")
        seen.add(reservation.reservation_id)
        held = book.reservations.get(reservation.reservation_id)
        if held is None:
            fresh.append(_import(begun))
        elif held.reservation != reservation or held.participation != begun.participation:
            raise Refused(f"{history.client}: reservation {reservation.reservation_id} is another there than here")
        elif held.void:
            revived.setdefault(reservation.run_id, []).append(reservation.reservation_id)
    return fresh, revived


def _is_inside(begun: Begun, charged: ChargedRun) -> bool:
    """Whether what began lies inside the envelope that was charged: a client's guard lets nothing else begin."""
    event = begun.reservation.event
    if charged.epsilon is None or event is None:
        return charged.epsilon is None and event is None
    return charged.envelope.allows(begun.participation, event)


def _registration(client: str, charged: ChargedRun, public_key: str) -> Draft:
    budget = None
    if charged.epsilon is not None:
        budget = Budget(charged.epsilon, charged.delta, charged.relation)
    registration = Registration(charged.dataset, budget, charged.envelope, public_key, charged.group)
    epsilon = charged.epsilon if charged.epsilon is not None and math.isfinite(charged.epsilon) else None
    body = {"client": client, "registration": registration.to_json(), "epsilon": epsilon}
    return Draft("register", charged.run_id, body, canonical(["register", charged.run_id, client]).decode())


def _import(begun: Begun) -> Draft:
    body = {"reservation": begun.reservation.to_json(), "participation": begun.participation}
    key = canonical(["import", begun.reservation.reservation_id]).decode()
    return Draft("import", begun.reservation.run_id, body, key)
