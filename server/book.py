"""What the coordinator's ledger says, as plain values: a fold over its lines, without rules and without writing.

``server/accountant.py`` decides and writes; this file only remembers. The same lines always give the same book.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.accounts import Registration
from common.charge import related
from common.errors import LedgerCorrupt
from common.ledger import Entry
from common.messages import Reservation
from common.privacy import SampledGaussian


@dataclass(eq=False)
class Held:
    """A reservation and what has become of it; ``head`` is the ledger's head when it was written."""

    reservation: Reservation
    participation: int
    head: str
    sending: bool = False
    outcome: str | None = None
    void: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether it counts: everything counts that was not voided."""
        return not self.void


@dataclass(eq=False)
class Account:
    """One client in one run: its registration, its envelope's ε (infinite without privacy), its reservations."""

    registration: Registration
    epsilon: float
    held: list[Held] = field(default_factory=list)
    _places: Counter[int] = field(default_factory=Counter)
    _lowest_free: int = 0
    _crowded: int = 0

    def count(self, held: Held) -> None:
        """Let a reservation count, from now on or again."""
        self._places[held.participation] += 1
        self._crowded += self._places[held.participation] > 1
        while self._places[self._lowest_free] > 0:
            self._lowest_free += 1

    def discount(self, held: Held) -> None:
        """A reservation was voided: its place is free, unless another holds it too."""
        self._crowded -= self._places[held.participation] > 1
        self._places[held.participation] -= 1
        if self._places[held.participation] == 0:
            self._lowest_free = min(self._lowest_free, held.participation)

    def spent(self) -> list[Held]:
        """The reservations that count."""
        return [held for held in self.held if held.is_spent]

    def events(self) -> tuple[SampledGaussian, ...]:
        """The events that count, in the order of reservation."""
        return tuple(held.reservation.event for held in self.spent() if held.reservation.event is not None)

    def places_are_distinct(self) -> bool:
        """False when a voided reservation counts again and its place was given away meanwhile."""
        return self._crowded == 0

    def next_participation(self) -> int:
        """The lowest place of the envelope that no counting reservation holds."""
        return self._lowest_free


Request = tuple[str, int, str, int]
"""(run, round, client, attempt): what a reservation answers to."""


class Book:
    """Everything the accountant decides on."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Account]] = {}
        self.reservations: dict[str, Held] = {}
        self.requests: dict[Request, Held] = {}
        self._kinds = {
            "register": self._register,
            "reserve": self._reserve,
            "sending": self._sending,
            "commit": self._commit,
            "void": self._void,
            "import": self._import,
        }

    def apply(self, entry: Entry) -> None:
        """Take one line into account.

        Raises:
            LedgerCorrupt: the line is of a kind, or speaks of something, that this program never wrote.
        """
        try:
            self._kinds[entry.kind](entry, entry.body)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerCorrupt(f"ledger line {entry.seq} ({entry.kind}) makes no sense here: {error!r}") from error

    def related(self, client: str, dataset: str, group: str | None) -> list[Account]:
        """The accounts, over all runs, that may hold the same records: same data set, or linked by a group.

        Once two data sets were in one group, they stay linked.
        """
        accounts = [held[client] for held in self.runs.values() if client in held]
        members = [(account.registration.dataset, account.registration.group) for account in accounts]
        return [accounts[index] for index in related(members, dataset, group)]

    def _register(self, entry: Entry, body: Mapping[str, Any]) -> None:
        epsilon = math.inf if body["epsilon"] is None else float(body["epsilon"])
        account = Account(Registration.from_json(body["registration"]), epsilon)
        self.runs.setdefault(entry.scope, {})[body["client"]] = account

    def _reserve(self, entry: Entry, body: Mapping[str, Any]) -> None:
        reservation = Reservation.from_json(body["reservation"])
        held = Held(reservation, body["participation"], entry.hash)
        account = self.runs[reservation.run_id][reservation.client]
        account.held.append(held)
        account.count(held)
        self.reservations[reservation.reservation_id] = held
        self.requests[request_of(reservation)] = held

    def _import(self, entry: Entry, body: Mapping[str, Any]) -> None:
        """A reservation that only the client still knew of: it counts, and is closed."""
        known = self.requests.get(request_of(Reservation.from_json(body["reservation"])))
        self._reserve(entry, body)
        held = self.reservations[body["reservation"]["reservation_id"]]
        held.sending, held.outcome = True, "unknown"
        if known is not None:  # the round was asked for again meanwhile: that answer stays, and both count
            self.requests[request_of(held.reservation)] = known

    def _sending(self, _entry: Entry, body: Mapping[str, Any]) -> None:
        for reservation_id in body["reservations"]:
            self.reservations[reservation_id].sending = True

    def _commit(self, _entry: Entry, body: Mapping[str, Any]) -> None:
        for reservation_id, outcome in body["outcomes"].items():
            held = self.reservations[reservation_id]
            if held.void:
                self._account(held).count(held)
            held.outcome, held.void = outcome, False

    def _void(self, _entry: Entry, body: Mapping[str, Any]) -> None:
        held = self.reservations[body["reservation_id"]]
        if not held.void:
            held.void = True
            self._account(held).discount(held)

    def _account(self, held: Held) -> Account:
        return self.runs[held.reservation.run_id][held.reservation.client]


def request_of(reservation: Reservation) -> Request:
    """What ``reservation`` answers to."""
    return (reservation.run_id, reservation.server_round, reservation.client, reservation.attempt)
