"""Noise schedules fixed before training, each calibrated to a target (ε, δ) by PLD over its whole list.

A schedule is a shape (relative noise per round) times one factor; calibration finds the factor. The list is public and
does not look at any output, so its PLD holds (DESIGN §4.3). What a shape is good for depends on the run: with a
decreasing learning rate, noise proportional to learning_rate^(-1/2) minimises the noise that reaches the weights
(Wu et al. 2021, arXiv 2110.07435, for AdaGrad-like steps; Cauchy–Schwarz for any fixed list).

>>> held = noise_schedule("cosine", rounds=4, steps=10, sample_rate=0.1, target_epsilon=4, target_delta=1e-5, final=0.5)
>>> [round(x / held.noise_multipliers[0], 2) for x in held.noise_multipliers]
[1.0, 0.88, 0.62, 0.5]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from common.privacy import checks
from common.privacy.calibrate import smallest_meeting
from common.privacy.checks import TooLarge
from common.privacy.events import SampledGaussian
from common.privacy.pairs import Array
from common.privacy.pld import PLDAccountant

Kind = Literal["constant", "step", "exponential", "cosine", "lr-matched"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)


@dataclass(frozen=True)
class Schedule:
    """A list of rounds with the ε it was certified at.

    Attributes:
        kind: the shape.
        noise_multipliers: σ_t per round.
        sample_rate, steps: of every round.
        relation: neighbouring relation.
        epsilon, delta: what the whole list costs.
    """

    kind: Kind
    noise_multipliers: tuple[float, ...]
    sample_rate: float
    steps: int
    relation: checks.Relation
    epsilon: float
    delta: float

    @property
    def events(self) -> tuple[SampledGaussian, ...]:
        """One event per round."""
        return tuple(SampledGaussian(sigma, self.sample_rate, self.steps) for sigma in self.noise_multipliers)


def shape(
    kind: Kind,
    rounds: int,
    *,
    final: float = 0.5,
    drop: float = 0.5,
    every: int = 1,
    learning_rates: Sequence[float] | None = None,
) -> Array:
    """Return the relative noise per round, starting at 1; shape [rounds].

    Args:
        kind: ``constant``; ``step`` (times ``drop`` after every ``every`` rounds); ``exponential`` and ``cosine``
            (from 1 to ``final``); ``lr-matched`` (proportional to learning_rate^(-1/2)).
        rounds: number of rounds.
        final: relative noise of the last round, > 0 (above 1 the noise grows).
        drop: factor of a step.
        every: rounds between two steps.
        learning_rates: one per round, > 0; public.

    Raises:
        ValueError: naming the field that is out of range.
    """
    count = checks.count(rounds=rounds)
    last, factor, period = checks.positive(final=final), checks.positive(drop=drop), checks.count(every=every)
    progress = np.arange(count) / max(1, count - 1)
    if kind == "constant":
        return np.ones(count)
    if kind == "step":
        return np.asarray(factor ** (np.arange(count) // period))
    if kind == "exponential":
        return np.asarray(last**progress)
    if kind == "cosine":
        return np.asarray(last + (1 - last) * (1 + np.cos(math.pi * progress)) / 2)
    if kind == "lr-matched":
        rates = np.asarray([] if learning_rates is None else learning_rates, dtype=float)
        if rates.shape != (count,) or not np.all(np.isfinite(rates) & (rates > 0)):
            raise ValueError(f"learning_rates must be {count} finite numbers > 0, got {learning_rates!r}")
        return np.asarray(np.sqrt(rates[0] / rates))
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def noise_schedule(
    kind: Kind,
    *,
    rounds: int,
    steps: int,
    sample_rate: float,
    target_epsilon: float,
    target_delta: float,
    relation: checks.Relation = "add_remove",
    relative_tolerance: float = 1e-4,
    final: float = 0.5,
    drop: float = 0.5,
    every: int = 1,
    learning_rates: Sequence[float] | None = None,
) -> Schedule:
    """Return the least noisy schedule of a shape (within ``relative_tolerance``) whose certified ε meets the target.

    Args:
        kind: see :func:`shape`.
        rounds: number of rounds.
        steps: steps per round.
        sample_rate: q of every step.
        target_epsilon: what the whole list must not exceed.
        target_delta: at this δ.
        relation: neighbouring relation.
        relative_tolerance: how far above the smallest factor the noise may lie.
        final: see :func:`shape`.
        drop: see :func:`shape`.
        every: see :func:`shape`.
        learning_rates: see :func:`shape`.

    Raises:
        ValueError: naming the field that is out of range, or if the target cannot be met.
    """
    relative = shape(kind, rounds, final=final, drop=drop, every=every, learning_rates=learning_rates)
    factor, epsilon = calibrate_factor(
        relative,
        steps=steps,
        sample_rate=sample_rate,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        relation=relation,
        relative_tolerance=relative_tolerance,
    )
    sigmas = tuple(float(factor * r) for r in relative)
    return Schedule(kind, sigmas, sample_rate, steps, checks.known_relation(relation), epsilon, float(target_delta))


def calibrate_factor(
    relative: Sequence[float] | Array,
    *,
    steps: int,
    sample_rate: float,
    target_epsilon: float,
    target_delta: float,
    relation: checks.Relation = "add_remove",
    relative_tolerance: float = 1e-4,
) -> tuple[float, float]:
    """Return the factor f, and the certified ε, with which rounds of noise multiplier f·relative_t meet the target.

    Args:
        relative: relative noise per round, > 0; public.
        steps: steps per round.
        sample_rate: q of every step.
        target_epsilon: what the whole list must not exceed.
        target_delta: at this δ.
        relation: neighbouring relation.
        relative_tolerance: how far above the smallest factor f may lie.

    Raises:
        ValueError: naming the field that is out of range, or if the target cannot be met.
    """
    goal, delta = checks.positive(target_epsilon=target_epsilon), checks.delta_above_floor(target_delta=target_delta)
    costs: dict[float, float] = {}

    def cost(factor: float) -> float:
        events = [SampledGaussian(float(factor * r), sample_rate, steps) for r in relative]
        try:
            costs[factor] = PLDAccountant(relation).compose_all(events).epsilon(delta)
        except TooLarge:
            costs[factor] = math.inf
        return costs[factor]

    factor = smallest_meeting(
        cost, goal, guess=1.0, low=1e-2, high=1e6, relative_tolerance=checks.positive(tolerance=relative_tolerance)
    )
    return factor, costs[factor]
