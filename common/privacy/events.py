"""What was done, apart from what it costs: frozen events, the only thing a ledger has to keep.

An event fixes its cost completely; an accountant composes events. Events are public facts: no count
of records, no data, no random state.

>>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
>>> SampledGaussian.from_json(event.to_json()) == event
True
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from common.privacy import checks

EVENT_VERSION: Final = 1
_KIND: Final = "sampled_gaussian"
_FIELDS: Final = ("noise_multiplier", "sample_rate", "steps")


@dataclass(frozen=True, order=True, slots=True)
class SampledGaussian:
    """``steps`` Gaussian releases, each on a fresh Poisson sample of the records.

    Every step takes each record with probability ``sample_rate`` independently of all others, sums
    contributions of norm at most C, and adds Gaussian noise of standard deviation
    ``noise_multiplier * C`` per coordinate. ``sample_rate=1`` is the plain Gaussian mechanism.

    Attributes:
        noise_multiplier: σ, noise standard deviation over clipping norm; no unit; finite and > 0.
        sample_rate: q in (0, 1], the probability with which a step takes a record.
        steps: how many such releases; an integer >= 1.

    Raises:
        ValueError: naming the field, the value and the range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", checks.positive(noise_multiplier=self.noise_multiplier))
        object.__setattr__(self, "sample_rate", checks.rate(sample_rate=self.sample_rate))
        object.__setattr__(self, "steps", checks.count(steps=self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain JSON values, with its kind and version."""
        return {
            "kind": _KIND,
            "version": EVENT_VERSION,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "steps": self.steps,
        }

    def to_json(self) -> str:
        """Return one line of canonical JSON (sorted keys, shortest floats that read back exactly)."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, Any]) -> SampledGaussian:
        """Read an event back from JSON text or from the mapping it holds.

        Raises:
            ValueError: for an unknown kind, another version, a missing or an unknown field, or a value
                out of range. An event that is not understood is refused, never guessed.
        """
        record = _mapping(source)
        if record.get("kind") != _KIND:
            raise ValueError(f"kind must be {_KIND!r}, got {record.get('kind')!r}: an unknown event is refused")
        version = record.get("version")
        if isinstance(version, bool) or version != EVENT_VERSION:
            raise ValueError(f"version must be {EVENT_VERSION}, got {version!r}: this event is of another version")
        expected = {"kind", "version", *_FIELDS}
        if set(record) != expected:
            odd = sorted(map(str, set(record) ^ expected))
            raise ValueError(f"fields must be exactly {', '.join(sorted(expected))}; missing or unknown: {odd}")
        return cls(**{name: record[name] for name in _FIELDS})


def _mapping(source: str | bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    try:
        record = json.loads(source)
    except (TypeError, ValueError) as error:
        raise ValueError(f"event must be JSON text, got {source!r:.80}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"event must be a JSON object, got {type(record).__name__}")
    return record


def events_to_json(events: Iterable[SampledGaussian]) -> str:
    """Return a list of events as canonical JSON text."""
    records = [event.to_dict() for event in checked(events)]
    return json.dumps(records, sort_keys=True, separators=(",", ":"))


def events_from_json(text: str | bytes) -> tuple[SampledGaussian, ...]:
    """Read a list of events written by :func:`events_to_json`.

    Raises:
        ValueError: if the text is not a JSON list, or one of its events is refused.
    """
    try:
        records = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"events must be JSON text: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"events must be a JSON list, got {type(records).__name__}")
    return tuple(SampledGaussian.from_json(_entry(record)) for record in records)


def _entry(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"an event must be a JSON object, got {type(record).__name__}")
    return record


def checked(events: Iterable[Any]) -> tuple[SampledGaussian, ...]:
    """Return ``events`` as a tuple after refusing everything that is not a known event.

    The whole list is checked before anything is composed: a refusal leaves nothing half done.

    Raises:
        ValueError: naming the first entry that is not an event.
    """
    listed = tuple(events)
    for event in listed:
        if not isinstance(event, SampledGaussian):
            raise ValueError(f"event must be a SampledGaussian, got {type(event).__name__}: unknown events are refused")
    return listed
