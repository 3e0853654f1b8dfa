"""How far a first-order Edgeworth expansion can be from the truth: the published finite-sample bound.

Derumigny, Girard, Guyonvarch (2024, Sankhya A 86, 261-336; arXiv 2101.05780), the bound for independent and equally
distributed summands with four moments, from which the Edgeworth accountant (Wang et al. 2022) takes its interval.
For the standardised sum of n steps sup_x |F(x) − F_1(x)| <= Ω_1 + Ω_2 + Ω_3 with T = 2π sqrt(n)/K̃_3; K_r and λ_3 are
the absolute and plain standardised moments of one step, and K̃_3 = K_3 + E|X|/B. Moments are centred, as the bound
asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from common.privacy import checks
from common.privacy.cumulants import absolute_moments
from common.privacy.pairs import Array

_SHARE: Final = 0.1  # the free parameter "ε" of the bound, in (0, 1/3)
_X, _W = np.polynomial.legendre.leggauss(64)


def expansion_error(
    noise_multiplier: float, sample_rate: float, steps: int, relation: checks.Relation
) -> tuple[float, float]:
    """Return the bounds for the sum of losses under P and under Q (a probability each; useless above 1)."""
    rows = absolute_moments(noise_multiplier, sample_rate, relation)
    return _bound(rows[0], steps), _bound(rows[1], steps)


def _bound(moments: Array, n: int) -> float:
    first, third, variance, skew, fourth = (float(m) for m in moments)
    scale = math.sqrt(variance)
    k3, k4, l3 = third / scale**3, fourth / scale**4, abs(skew) / scale**3
    k3_tilde = k3 + first / scale
    t = 2 * math.pi * math.sqrt(n) / k3_tilde
    omega_1 = 1.2533 / t + 0.3334 * l3 / (t * math.sqrt(n)) + 14.1961 / t**4
    omega_1 += l3 * math.exp(-(t**2) / (4 * math.pi**2)) / (3 * math.pi * math.sqrt(n))
    omega_2 = 67.0415 / t**4 + 1.2187 / t**2
    return omega_1 + omega_2 + _omega_3(n, t, k3, k3_tilde, k4, l3)


def _omega_3(n: int, t: float, k3: float, k3_tilde: float, k4: float, l3: float) -> float:
    """Return the bound on the central part: near the origin by a Taylor expansion, further out by absolute values."""
    ratio, spread = k4 / n, 1 / (1 - 3 * _SHARE) ** 2
    root = math.sqrt(2 * _SHARE)
    p1 = (144 + 48 * _SHARE + 4 * _SHARE**2 + 96 * root + 32 * _SHARE + 16 * math.sqrt(2) * _SHARE**1.5) / 576
    e1 = math.exp(_SHARE**2 * (1 / 6 + 2 * p1 * spread))
    edge = root / ratio**0.25

    def remainder(u: Array) -> Array:
        u11 = u**6 / 24 * ratio**1.5 + u**8 / 576 * ratio**2
        u12 = u**5 / 6 * ratio**1.25 + u**6 / 36 * ratio**1.5 + u**7 / 72 * ratio**1.75
        inner = 1 / 24 + p1 / 2 * spread
        cross = u**8 * ratio**2 / 2 * inner**2 + u**7 * l3 * k4 / (6 * n**1.5) * inner
        return np.asarray((u11 + u12) / 2 * spread + e1 * cross)

    near = _integral(lambda u: u * np.exp(-(u**2) / 2) * remainder(u), 0.0, edge)
    central = 0.327 * ratio * (1 / 12 + spread / 4) + 0.036278 * e1 * l3**2 / n + 0.32636 * near
    limit = t / math.pi
    drift = 0.198324 * k3_tilde / math.sqrt(n)
    far_p = _integral(lambda u: u**2 * np.exp(-(u**2) / 2 * (1 - drift * u - math.sqrt(ratio))), edge, limit)
    far_n = _integral(lambda u: u**2 * np.exp(-(u**2) / 2), edge, limit)
    return central + 0.16318 / (3 * math.sqrt(n)) * (k3 * far_p + l3 * far_n)


def _integral(f: Callable[[Array], Array], low: float, high: float) -> float:
    """Integrate over [low, high] in 64 Gauss–Legendre nodes."""
    if high <= low:
        return 0.0
    middle, half = (low + high) / 2, (high - low) / 2
    return float(half * (_W @ f(middle + half * _X)))
