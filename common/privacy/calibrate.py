"""Search for the noise, the steps or the sample rate that just meet a target ε; knows no mechanism.

Each search brackets a monotone cost, narrows the bracket, and returns the side on which the target was
*seen* to be met: the result is certified by an evaluation, not by the search.

>>> sigma = calibrate_noise_multiplier(target_epsilon=3, target_delta=1e-5, sample_rate=0.01, steps=1000)
>>> round(sigma, 3)
0.814
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

from common.privacy import checks
from common.privacy.checks import TooLarge
from common.privacy.events import SampledGaussian
from common.privacy.pld import PLDAccountant

_LOWEST_NOISE: Final = 1e-2
_HIGHEST_NOISE: Final = 1e6


class Accountant(Protocol):
    """What calibration needs of an accountant."""

    def compose_all(self, events: tuple[SampledGaussian, ...]) -> Accountant:
        """Return an accountant that has also seen ``events``."""

    def epsilon(self, delta: float) -> float:
        """Return an upper bound on ε at ``delta``."""


def smallest_meeting(
    cost: Callable[[float], float], target: float, *, low: float, high: float, relative_tolerance: float = 1e-4
) -> float:
    """Return an x in (low, high] with cost(x) <= target, at most a factor 1 + tolerance above the smallest such x.

    Args:
        cost: non-increasing in x.
        target: what cost must not exceed.
        low: a positive start of the search; returned if the target is met there already.
        high: the largest x to try.
        relative_tolerance: when to stop.

    Raises:
        ValueError: if the target is not met even at ``high``.
    """
    x = min(max(1.0, 2 * low), high)
    while cost(x) > target:
        low, x = x, min(2 * x, high)
        if low == high:
            raise ValueError(f"target {target:g} is not met up to {high:g}")
    met = x
    while met > low * (1 + relative_tolerance):
        middle = math.sqrt(low * met)
        if cost(middle) <= target:
            met = middle
        else:
            low = middle
    return met


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    relation: checks.Relation = "add_remove",
    relative_tolerance: float = 1e-4,
) -> float:
    """Return the smallest noise multiplier (within ``relative_tolerance``) whose certified ε meets the target.

    Args:
        target_epsilon: ε > 0 to stay at or below.
        target_delta: δ.
        sample_rate: q in (0, 1].
        steps: number of steps.
        relation: neighbouring relation.
        relative_tolerance: how far above the smallest one the result may lie.

    Raises:
        ValueError: for a field out of range, or if no noise multiplier up to 1e6 meets the target.
    """
    target_epsilon = checks.positive(target_epsilon=target_epsilon)
    target_delta = checks.delta_above_floor(target_delta=target_delta)
    event = SampledGaussian(1.0, sample_rate, steps)

    def cost(noise_multiplier: float) -> float:
        candidate = SampledGaussian(noise_multiplier, event.sample_rate, event.steps)
        try:
            return PLDAccountant(relation).compose(candidate).epsilon(target_delta)
        except TooLarge:
            return math.inf

    return smallest_meeting(
        cost, target_epsilon, low=_LOWEST_NOISE, high=_HIGHEST_NOISE, relative_tolerance=relative_tolerance
    )
