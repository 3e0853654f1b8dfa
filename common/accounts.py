"""What coordinator and accountant say to each other, as frozen dataclasses: the same in one process and between two.

``server/accountant.py`` decides; these are its questions and answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from common.messages import Envelope, SignedReservation
from common.privacy import SampledGaussian


@dataclass(frozen=True)
class Budget:
    """What a data set may spend: in one run, and, where a lifetime is set, over all runs together.

    Attributes:
        target_epsilon, target_delta: of one run's envelope.
        relation: neighbouring relation; unit: what one neighbour adds or removes.
        lifetime_epsilon, lifetime_delta: bound of the sums Σε, Σδ over the envelopes of all runs; None: no such bound.
            The strictest that was ever registered for a data set holds.
    """

    target_epsilon: float
    target_delta: float
    relation: str = "add_remove"
    unit: str = "record"
    lifetime_epsilon: float | None = None
    lifetime_delta: float | None = None


@dataclass(frozen=True)
class Registration:
    """One client's part in a run.

    Attributes:
        dataset: whose budget is spent; belongs to the client of that name.
        budget: None for a run without privacy.
        envelope: the most this client may spend in this run, one event per participation.
        public_key: the client's, which signs refusals.
        group: data sets of one client that may share a record are one budget.
    """

    dataset: str
    budget: Budget | None
    envelope: Envelope
    public_key: str
    group: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that is recorded."""
        return {
            "dataset": self.dataset,
            "budget": None if self.budget is None else vars(self.budget).copy(),
            "envelope": self.envelope.to_json(),
            "public_key": self.public_key,
            "group": self.group,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Registration:
        """The inverse of ``to_json``."""
        budget = None if value["budget"] is None else Budget(**value["budget"])
        return cls(value["dataset"], budget, Envelope.from_json(value["envelope"]), value["public_key"], value["group"])


@dataclass(frozen=True)
class Ask:
    """One client's part of ``reserve``; ``event`` is None in a run without privacy."""

    client: str
    event: SampledGaussian | None
    attempt: int = 1


@dataclass(frozen=True)
class Denial:
    """Why one client is left out of a round.

    Attributes:
        spent: ε of what is reserved already; asked: ε that would be reached; left: what the target leaves.
        reason: ``budget`` (every place of the envelope is taken) or ``envelope`` (the event lies outside its place).
    """

    client: str
    spent: float
    asked: float
    left: float
    reason: str = "budget"


@dataclass(frozen=True)
class Answer:
    """Who may be asked to train, and who may not; ``participation`` maps reservation id to place in the envelope."""

    granted: tuple[SignedReservation, ...]
    denied: tuple[Denial, ...]
    participation: Mapping[str, int]


class Outcome(StrEnum):
    """What became of something that was sent; all of them cost the whole event."""

    REPLIED = "replied"
    REFUSED = "refused"
    ERROR = "error"
    TIMEOUT = "timeout"
    LOST = "lost"
    UNKNOWN = "unknown"
    LATE = "late"


@dataclass(frozen=True)
class OpenReservation:
    """A reservation without an outcome; ``sending``: the mark was written, so it may have been sent."""

    signed: SignedReservation
    sending: bool


@dataclass(frozen=True)
class Spent:
    """What one client has spent in one run, open reservations included.

    ``epsilon`` (PLD) and ``epsilon_rdp`` are upper bounds; both are infinite when a round was made without privacy.
    """

    events: tuple[SampledGaussian, ...]
    epsilon: float
    epsilon_rdp: float
    target_epsilon: float
    target_delta: float


@dataclass(frozen=True)
class Reconciled:
    """What a client's signed list taught the coordinator: ids that were imported, and such that count again."""

    imported: tuple[str, ...]
    revived: tuple[str, ...]
