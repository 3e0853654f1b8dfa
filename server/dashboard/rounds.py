"""Who was asked in which round, what became of it, and whether it is charged: a fold over the ledger's reservations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from common.privacy import SampledGaussian
from server.book import Account, Held
from server.dashboard.records import Folded

Word = Literal["replied", "refused", "failed", "open", "returned"]


@dataclass
class Tally:
    """Reservations by what became of them; ``returned`` was never sent, and ``open`` has no outcome yet."""

    replied: int = 0
    refused: int = 0
    failed: int = 0
    open: int = 0
    returned: int = 0

    @property
    def asked(self) -> int:
        """All of them."""
        return self.replied + self.refused + self.failed + self.open + self.returned

    def count(self, word: Word) -> None:
        """One more."""
        setattr(self, word, getattr(self, word) + 1)


@dataclass(frozen=True)
class Trouble:
    """A reservation that brought no update.

    Attributes:
        word: refused, failed or returned; detail: the reason of the refusal, or the outcome.
        charged: whether it counts; everything that was sent does, unless its client signed that it never began.
        event: what it costs, or would have; None without privacy.
    """

    reservation_id: str
    server_round: int
    client: str
    word: Word
    detail: str
    charged: bool
    event: SampledGaussian | None


@dataclass
class Course:
    """A run's reservations, by round and by client, and those that went wrong, the latest first."""

    rounds: dict[int, Tally] = field(default_factory=dict)
    clients: dict[str, Tally] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)


def course(folded: Folded, run_id: str, only: str | None = None) -> Course:
    """The run's course, of all clients or of one."""
    found = Course()
    for name, account in folded.book.runs.get(run_id, {}).items():
        if only is not None and name != only:
            continue
        mine = found.clients.setdefault(name, Tally())
        for held in account.held:
            word, detail = fate(held, folded)
            mine.count(word)
            found.rounds.setdefault(held.reservation.server_round, Tally()).count(word)
            if word not in ("replied", "open"):
                found.troubles.append(_trouble(held, word, detail))
    found.troubles.sort(key=lambda one: (-one.server_round, one.client, one.reservation_id))
    return found


@dataclass(frozen=True)
class Participant:
    """One request of one round: to whom, which attempt, what became of it, whether it is charged and for what."""

    client: str
    attempt: int
    word: Word
    detail: str
    charged: bool
    event: SampledGaussian | None


def participants(folded: Folded, accounts: Mapping[str, Account], server_round: int) -> list[Participant]:
    """Everybody of ``accounts`` who was asked in a round, in the order of names."""
    found = []
    for name in sorted(accounts):
        for held in accounts[name].held:
            if held.reservation.server_round == server_round:
                word, detail = fate(held, folded)
                event, attempt = held.reservation.event, held.reservation.attempt
                found.append(Participant(name, attempt, word, detail, held.is_spent, event))
    return found


def fate(held: Held, folded: Folded) -> tuple[Word, str]:
    """What became of a reservation, and the word that says why."""
    if held.void:
        reason = folded.refusals.get(held.reservation.reservation_id)
        return ("returned", "never sent") if reason is None else ("refused", reason)
    if held.outcome is None:
        return "open", "no answer yet"
    if held.outcome == "replied":
        return "replied", ""
    return ("refused", "without giving it back") if held.outcome == "refused" else ("failed", held.outcome)


def events_until(held: Iterable[Held], server_round: int) -> tuple[SampledGaussian, ...]:
    """What counts of the rounds up to ``server_round``, in the order of reservation."""
    return tuple(
        one.reservation.event
        for one in held
        if one.is_spent and one.reservation.server_round <= server_round and one.reservation.event is not None
    )


def _trouble(held: Held, word: Word, detail: str) -> Trouble:
    reservation = held.reservation
    return Trouble(
        reservation.reservation_id, reservation.server_round, reservation.client, word, detail, held.is_spent,
        reservation.event,
    )  # fmt: skip
