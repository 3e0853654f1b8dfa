"""Search for the noise, the steps or the sample rate that just meet a target ε; the search knows no mechanism.

Each search brackets a monotone cost, narrows the bracket, and returns the side on which the target was
*seen* to be met: the result is certified by an evaluation, not by the search.

>>> sigma = calibrate_noise_multiplier(target_epsilon=3, target_delta=1e-5, sample_rate=0.01, steps=1000)
>>> round(sigma, 3)
0.814
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final, Protocol, Self

from common.privacy import checks
from common.privacy.checks import TooLarge
from common.privacy.events import SampledGaussian
from common.privacy.pld import PLDAccountant

_NOISE_RANGE: Final = (1e-2, 1e6)
_MOST_STEPS: Final = 10**9
_LEAST_RATE: Final = 1e-12


class Accountant(Protocol):
    """What calibration needs of an accountant; :class:`PLDAccountant` and :class:`RDPAccountant` have it."""

    def compose_all(self, events: Iterable[SampledGaussian]) -> Self:
        """Return an accountant that has also seen ``events``."""

    def epsilon(self, delta: float) -> float:
        """Return an upper bound on ε at ``delta``."""


MakeAccountant = Callable[[checks.Relation], Accountant]


def smallest_meeting(
    cost: Callable[[float], float],
    target: float,
    *,
    guess: float,
    low: float,
    high: float,
    relative_tolerance: float = 1e-4,
) -> float:
    """Return an x in [low, high] with cost(x) <= target, at most a factor 1 + tolerance above one where it is not.

    Args:
        cost: non-increasing in x (up to its own rounding); may be infinite.
        target: what cost must not exceed; > 0.
        guess: where to start.
        low: the smallest x to try; returned if the target is met there.
        high: the largest x to try.
        relative_tolerance: when to stop.

    Raises:
        ValueError: if the target is not met at ``high`` either.
    """
    unmet, met = _bracket(cost, target, min(max(guess, low), high), low, high)
    rounds = 0
    while met[0] > unmet[0] * (1 + relative_tolerance) and unmet[0] >= low:
        rounds += 1
        x = _inside(unmet, met, target, relative_tolerance, halve=rounds % 3 == 0)
        value = cost(x)
        if value <= target:
            met = (x, value)
        else:
            unmet = (x, value)
    return met[0]


_Point = tuple[float, float]  # x, cost(x)


def _bracket(cost: Callable[[float], float], target: float, x: float, low: float, high: float) -> tuple[_Point, _Point]:
    """Return (unmet, met); unmet lies below ``low`` if the target is met at ``low``."""
    value, factor = cost(x), 1.5
    if value <= target:
        while value <= target:
            met = (x, value)
            if x == low:
                return (0.0, math.inf), met
            x, factor = max(low, x / factor), factor**2
            value = cost(x)
        return (x, value), met
    while value > target:
        unmet = (x, value)
        if x == high:
            raise ValueError(f"target {target:g} is not met up to {high:g}: it still costs {value:g} there")
        x, factor = min(high, x * factor), factor**2
        value = cost(x)
    return unmet, (x, value)


def _inside(unmet: _Point, met: _Point, target: float, tolerance: float, *, halve: bool) -> float:
    """Return the next x between the ends: by a secant in logarithms, aimed a third of the tolerance past the root."""
    (a, cost_a), (b, cost_b) = unmet, met
    middle = math.sqrt(a * b)
    if halve or not (math.isfinite(cost_a) and cost_b > 0 and cost_a > cost_b):
        return middle
    share = math.log(cost_a / target) / math.log(cost_a / cost_b)
    root = a * (b / a) ** share
    nudge = 1 + tolerance / 3
    # Alternate the side: once the root is known well, one step on either side closes the bracket.
    x = root * nudge if b > root * nudge * (1 + tolerance) else root / nudge
    return x if a < x < b else middle


def largest_count_meeting(cost: Callable[[int], float], target: float, *, most: int = _MOST_STEPS) -> int:
    """Return the largest n in [0, most] with cost(n) <= target, by doubling and bisection.

    Args:
        cost: non-decreasing in n (up to its own rounding); cost(0) is taken to be 0.
        target: what cost must not exceed.
        most: the largest n to try.
    """
    met, n = 0, 1
    while n <= most and cost(n) <= target:
        met, n = n, 2 * n
    if met == most:
        return most
    unmet = min(n, most + 1)
    while unmet - met > 1:
        middle = (met + unmet) // 2
        if cost(middle) <= target:
            met = middle
        else:
            unmet = middle
    return met


def _cost(events: Iterable[SampledGaussian], delta: float, relation: checks.Relation, make: MakeAccountant) -> float:
    try:
        return make(relation).compose_all(events).epsilon(delta)
    except TooLarge:
        return math.inf


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    relation: checks.Relation = "add_remove",
    accountant: MakeAccountant = PLDAccountant,
    relative_tolerance: float = 1e-4,
) -> float:
    """Return the smallest noise multiplier (within ``relative_tolerance``) whose certified ε meets the target.

    Args:
        target_epsilon: ε > 0 to stay at or below.
        target_delta: δ.
        sample_rate: q in (0, 1].
        steps: number of steps.
        relation: neighbouring relation.
        accountant: makes an empty accountant for a relation; PLD by default.
        relative_tolerance: how far above the smallest one the result may lie.

    Raises:
        ValueError: for a field out of range, or if no noise multiplier up to 1e6 meets the target.
    """
    goal, delta = checks.positive(target_epsilon=target_epsilon), checks.delta_above_floor(target_delta=target_delta)
    start = SampledGaussian(1.0, sample_rate, steps)
    low, high = _NOISE_RANGE

    def cost(noise_multiplier: float) -> float:
        return _cost([SampledGaussian(noise_multiplier, start.sample_rate, start.steps)], delta, relation, accountant)

    return smallest_meeting(
        cost, goal, guess=1.0, low=low, high=high, relative_tolerance=checks.positive(tolerance=relative_tolerance)
    )


def calibrate_steps(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    sample_rate: float,
    relation: checks.Relation = "add_remove",
    accountant: MakeAccountant = PLDAccountant,
) -> int:
    """Return how many steps fit into the target; 0 if not even one does.

    Raises:
        ValueError: for a field out of range.
    """
    goal, delta = checks.positive(target_epsilon=target_epsilon), checks.delta_above_floor(target_delta=target_delta)
    one = SampledGaussian(noise_multiplier, sample_rate)

    def cost(steps: int) -> float:
        return _cost([SampledGaussian(one.noise_multiplier, one.sample_rate, steps)], delta, relation, accountant)

    return largest_count_meeting(cost, goal)


def calibrate_sample_rate(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    steps: int,
    relation: checks.Relation = "add_remove",
    accountant: MakeAccountant = PLDAccountant,
    relative_tolerance: float = 1e-4,
) -> float:
    """Return the largest sample rate (within ``relative_tolerance``) whose certified ε meets the target.

    Raises:
        ValueError: for a field out of range, or if not even a rate of 1e-12 meets the target.
    """
    goal, delta = checks.positive(target_epsilon=target_epsilon), checks.delta_above_floor(target_delta=target_delta)
    full = SampledGaussian(noise_multiplier, 1.0, steps)

    def cost(inverse_rate: float) -> float:
        event = SampledGaussian(full.noise_multiplier, min(1.0, 1 / inverse_rate), full.steps)
        return _cost([event], delta, relation, accountant)

    inverse = smallest_meeting(
        cost, goal, guess=100.0, low=1.0, high=1 / _LEAST_RATE, relative_tolerance=relative_tolerance
    )
    return min(1.0, 1 / inverse)
