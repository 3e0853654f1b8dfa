"""Checks at the door: every public number of ``common.privacy`` passes here once, by keyword.

The error names the field, the value and the range:

>>> positive(noise_multiplier=-1)
Traceback (most recent call last):
    ...
ValueError: noise_multiplier must be a finite number > 0, got -1
"""

from __future__ import annotations

import math
import operator
from typing import Any, Final, Literal, get_args

Relation = Literal["add_remove", "zero_out", "replace_one"]
RELATIONS: Final[tuple[str, ...]] = get_args(Relation)

# Below this the tail masses that the accountants set aside (about 1e-8 * delta per query) come near
# the smallest numbers whose quotients a double still resolves after composition.
DELTA_FLOOR: Final = 1e-15


def _number(name: str, value: Any, wanted: str) -> float:
    if isinstance(value, bool | str | bytes):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None


def positive(**named: Any) -> float:
    """Return the one keyword argument as a float that is finite and > 0."""
    ((name, value),) = named.items()
    number = _number(name, value, "a finite number > 0")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return number


def nonnegative(**named: Any) -> float:
    """Return the one keyword argument as a float that is finite and >= 0."""
    ((name, value),) = named.items()
    number = _number(name, value, "a finite number >= 0")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def rate(**named: Any) -> float:
    """Return the one keyword argument as a float in (0, 1]."""
    ((name, value),) = named.items()
    number = _number(name, value, "in (0, 1]")
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return number


def count(**named: Any) -> int:
    """Return the one keyword argument as an integer >= 1; a fraction or a truth value is refused."""
    ((name, value),) = named.items()
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return number


def probability(**named: Any) -> float:
    """Return the one keyword argument as a float in (0, 1)."""
    ((name, value),) = named.items()
    number = _number(name, value, "in (0, 1)")
    if not 0 < number < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return number


def delta_above_floor(**named: Any) -> float:
    """Return the one keyword argument as a δ in [DELTA_FLOOR, 1)."""
    ((name, value),) = named.items()
    number = probability(**named)
    if number < DELTA_FLOOR:
        raise ValueError(
            f"{name} must be at least {DELTA_FLOOR:g} to be computed soundly in double precision, got {value!r}"
        )
    return number


def known_relation(relation: Any) -> Relation:
    """Return ``relation`` if it is one of :data:`RELATIONS`."""
    for known in get_args(Relation):
        if relation == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")


class TooLarge(ValueError):
    """A setting that cannot be computed soundly within the limits of memory and time: refused, never guessed."""
