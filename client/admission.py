"""What the guard says to a request, and what it says of a data set's budget."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Refusal, Reply, TrainRequest


@dataclass(frozen=True)
class Granted:
    """The request may be trained: call ``start``, train, call ``finish``."""

    request: TrainRequest


@dataclass(frozen=True)
class Replay:
    """The request was answered before: this is the same reply, byte for byte."""

    reply: Reply


@dataclass(frozen=True)
class Lost:
    """Training had begun and its result is gone: spent, and never trained again."""


@dataclass(frozen=True)
class Refused:
    """No, signed."""

    refusal: Refusal


Admission = Granted | Replay | Lost | Refused


@dataclass(frozen=True)
class DatasetSpent:
    """Σε and Σδ charged to a data set and its group, over all coordinators, beside what the policy allows."""

    epsilon: float
    delta: float
    target_epsilon: float
    target_delta: float

    @property
    def left(self) -> float:
        """ε that a further run may take at most."""
        return max(0.0, self.target_epsilon - self.epsilon)
