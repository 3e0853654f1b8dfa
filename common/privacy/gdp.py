"""Exact (ε, δ) of the Gaussian mechanism, and its composition.

A Gaussian release with noise multiplier σ is μ-GDP with μ = s/σ (s = 1 for add/remove and zero-out, 2 for
replace-one, whose two sums differ by up to 2C); releases compose to μ² = Σ μ_t² exactly (Dong, Roth, Su
2019, Corollary 3.3). Its privacy profile is (Balle and Wang 2018, Theorem 8)

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).

>>> round(gdp_epsilon(1.0, 1e-5), 6)
4.377178
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scipy.optimize import brentq
from scipy.special import log_ndtr

from common.privacy import checks
from common.privacy.events import SampledGaussian, checked

# log_ndtr is good to a few ulp; the subtraction below loses at most a few digits more.
_SLACK = 1e-12


def sensitivity(relation: checks.Relation) -> float:
    """Return by how many clipping norms two neighbouring sums can differ: 1, or 2 for ``replace_one``."""
    return 2.0 if checks.known_relation(relation) == "replace_one" else 1.0


def log_gdp_delta(mu: float, epsilon: float) -> float:
    """Return log δ(ε) of a μ-GDP mechanism (−inf where it underflows even as a logarithm).

    Args:
        mu: μ > 0.
        epsilon: ε >= 0.
    """
    upper, lower = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    log_first = float(log_ndtr(upper))
    log_ratio = epsilon + float(log_ndtr(lower)) - log_first
    if log_ratio >= 0:  # both terms agree to the last digit: δ is below what a double can tell from zero
        return -math.inf
    return log_first + math.log(-math.expm1(log_ratio))


def gdp_delta(mu: float, epsilon: float) -> float:
    """Return δ(ε) of a μ-GDP mechanism, rounded up.

    Raises:
        ValueError: for μ <= 0 or ε < 0.
    """
    mu, epsilon = checks.positive(mu=mu), checks.nonnegative(epsilon=epsilon)
    return min(1.0, math.exp(log_gdp_delta(mu, epsilon)) * (1 + _SLACK))


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the smallest ε with δ(ε) <= ``delta`` for a μ-GDP mechanism, rounded up.

    Raises:
        ValueError: for μ <= 0, or δ outside [1e-15, 1).
    """
    mu, delta = checks.positive(mu=mu), checks.delta_above_floor(delta=delta)
    goal = math.log(delta)
    if log_gdp_delta(mu, 0.0) <= goal:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(-2 * goal)  # δ(ε) <= Φ(μ/2 − ε/μ) <= exp(−(ε/μ − μ/2)²/2)
    root = float(brentq(lambda e: log_gdp_delta(mu, e) - goal, 0.0, high, xtol=1e-15, rtol=4 * 2.3e-16))
    while log_gdp_delta(mu, root) > goal:  # a root finder may stop on either side: end on the safe one
        root = math.nextafter(root * (1 + _SLACK), math.inf)
    return root * (1 + _SLACK)


def gdp_mu(epsilon: float, delta: float) -> float:
    """Return the largest μ whose exact ε at ``delta`` is at most ``epsilon``, rounded down.

    Raises:
        ValueError: for ε <= 0, or δ outside [1e-15, 1).
    """
    epsilon, delta = checks.positive(epsilon=epsilon), checks.delta_above_floor(delta=delta)
    goal = math.log(delta)
    low, high = 1e-12, 2.0
    while log_gdp_delta(high, epsilon) <= goal:
        high *= 2
    root = float(brentq(lambda m: log_gdp_delta(m, epsilon) - goal, low, high, xtol=1e-300, rtol=4 * 2.3e-16))
    while log_gdp_delta(root, epsilon) > goal:
        root = math.nextafter(root * (1 - _SLACK), 0.0)
    return root * (1 - _SLACK)


def composed_mu(events: Iterable[SampledGaussian], relation: checks.Relation = "add_remove") -> float:
    """Return μ of a list of unsampled Gaussian events: sqrt(Σ steps · (s/σ)²).

    Raises:
        ValueError: if an event is sampled (q < 1): a Poisson-sampled Gaussian is not μ-GDP with a useful μ.
    """
    total = 0.0
    for event in checked(events):
        if event.sample_rate != 1:
            raise ValueError(f"sample_rate must be 1 for exact GDP, got {event.sample_rate!r}")
        total += event.steps * (sensitivity(relation) / event.noise_multiplier) ** 2
    return math.sqrt(total)
