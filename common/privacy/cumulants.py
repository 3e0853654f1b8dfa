"""Cumulants of one step's privacy loss, plain and exponentially tilted, by quadrature.

The losses of independent steps add, and so do their cumulants: an accountant that keeps sums of cumulants
needs the same space for ten steps and for ten million.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np

from common.privacy import checks
from common.privacy.checks import TooLarge
from common.privacy.pairs import AddRemovePair, Array, Pair, dominating_pair

TILTS: Final[Array] = 2.0 ** (np.arange(-48, 49) / 8)  # θ from 1/64 to 64, ratio 2^(1/8)
_LEAST_NOISE: Final = 0.1


def nodes(pair: Pair, noise_multiplier: float, reach: float) -> tuple[Array, Array]:
    """Return log Q-masses and losses on equidistant nodes, a trapezoid rule that has converged.

    The integrands are analytic for |Im z| < πσ, so steps of σ/4 leave an error of e^(−8π²) (Trefethen and Weideman
    2014, Theorem 5.1).

    Args:
        pair: the dominating pair.
        noise_multiplier: its σ.
        reach: how far from the origin the outermost bump of the integrand may lie, in units of 1/σ.
    """
    step = min(0.25, noise_multiplier / 4)
    edge = 12 + reach / noise_multiplier
    z: Array = np.arange(-math.ceil(edge / step), math.ceil(edge / step) + 1, dtype=np.float64) * step
    return pair.log_density(z) + math.log(step), pair.loss(z)


def require_noise(noise_multiplier: float) -> None:
    """Refuse noise so small that its integrals are not resolved.

    Raises:
        TooLarge: for a noise multiplier below 0.1.
    """
    if noise_multiplier < _LEAST_NOISE:
        raise TooLarge(f"noise_multiplier must be at least {_LEAST_NOISE:g} for cumulants, got {noise_multiplier!r}")


def _steps_pair(noise_multiplier: float, sample_rate: float, relation: checks.Relation) -> tuple[Pair, float]:
    require_noise(noise_multiplier)
    pair = dominating_pair(noise_multiplier, sample_rate, relation)
    return pair, pair.noise_multiplier if isinstance(pair, AddRemovePair) else noise_multiplier


@lru_cache(maxsize=4096)
def plain_cumulants(noise_multiplier: float, sample_rate: float, relation: checks.Relation) -> Array:
    """Return cumulants 1 to 5 of the loss L = log P/Q under P and under Q; shape [2, 5].

    Raises:
        TooLarge: for a noise multiplier below 0.1.
    """
    pair, sigma = _steps_pair(noise_multiplier, sample_rate, relation)
    log_q, loss = nodes(pair, sigma, 2.0)
    return np.stack([_cumulants(log_q + loss, loss), _cumulants(log_q, loss)])


@lru_cache(maxsize=1024)
def tilted_cumulants(noise_multiplier: float, sample_rate: float, relation: checks.Relation) -> Array:
    """Return log E[e^(θX)] and the cumulants 1 to 5 of X tilted by θ, for every θ of :data:`TILTS`.

    X is the loss L under P in direction P‖Q (index 0), and −L under Q in direction Q‖P (index 1).

    Returns:
        Shape [2, 6, len(TILTS)].

    Raises:
        TooLarge: for a noise multiplier below 0.1.
    """
    pair, sigma = _steps_pair(noise_multiplier, sample_rate, relation)
    log_q, loss = nodes(pair, sigma, 2 * float(TILTS[-1]) + 2 if pair.symmetric else float(TILTS[-1]) + 1)
    result = np.empty((2, 6, len(TILTS)))
    for direction, (log_p, value) in enumerate(((log_q + loss, loss), (log_q, -loss))):
        for position, tilt in enumerate(TILTS):
            exponent = log_p + tilt * value
            highest = float(exponent.max())
            weight = np.exp(exponent - highest)
            total = float(weight.sum())
            result[direction, 0, position] = math.log(total) + highest
            result[direction, 1:, position] = _from_weights(weight / total, value)
    return result


def _cumulants(log_weight: Array, value: Array) -> Array:
    weight = np.exp(log_weight)
    return _from_weights(weight / weight.sum(), value)


def _from_weights(weight: Array, value: Array) -> Array:
    """Return cumulants 1 to 5 of a discrete distribution, by its central moments."""
    mean = float((weight * value).sum())
    centred = value - mean
    moments, term = [], weight * centred
    for _ in range(4):
        term = term * centred
        moments.append(float(term.sum()))
    m2, m3, m4, m5 = moments
    return np.array([mean, m2, m3, m4 - 3 * m2**2, m5 - 10 * m2 * m3])


@lru_cache(maxsize=256)
def absolute_moments(noise_multiplier: float, sample_rate: float, relation: checks.Relation) -> Array:
    """Return E|X−EX|, E|X−EX|³ and the central moments 2, 3, 4 of L under P and under Q; shape [2, 5]."""
    pair, sigma = _steps_pair(noise_multiplier, sample_rate, relation)
    log_q, loss = nodes(pair, sigma, 2.0)
    rows = []
    for log_weight in (log_q + loss, log_q):
        weight = np.exp(log_weight)
        weight = weight / weight.sum()
        centred = loss - float((weight * loss).sum())
        size = np.abs(centred)
        rows.append([float((weight * power).sum()) for power in (size, size**3, size**2, centred**3, size**4)])
    return np.array(rows)
