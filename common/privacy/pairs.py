r"""The pair of distributions that is worst for one step, per neighbouring relation.

A pair (P, Q) *dominates* a step when, for every α >= 0 and every two neighbouring data sets in either
order, the hockey-stick divergence of the step's outputs is at most H_α(P‖Q) = sup_S P(S) − α Q(S), or at
most H_α(Q‖P). Dominating pairs compose step by step, also when later steps look at earlier outputs
(Zhu, Dong, Wang 2022, Theorem 10), so one scalar pair is all an accountant needs.

With z = x/σ, c = 1/(2σ²), q the sample rate and φ the standard normal density:

* add/remove and zero-out:  Q = N(0, 1),  P = (1−q) N(0, 1) + q N(1/σ, 1)
* replace-one:              Q = (1−q) N(0, 1) + q N(−1/σ, 1),  P = (1−q) N(0, 1) + q N(1/σ, 1)

Why this is the worst case. Fix which of the other records were sampled; the hockey-stick divergence is
jointly convex, so mixing over that choice afterwards can only lower it. What is left are the mixtures
(1−q) N(0, I) + q N(x, I) and (1−q) N(0, I) + q N(x', I), with |x|, |x'| <= 1/σ, and x' = 0 for add/remove.
A test φ with N(0, I)-probability a has N(x, I)-probability at most Φ(Φ⁻¹(a) + |x|) and
N(x', I)-probability at least Φ(Φ⁻¹(a) − |x'|) (Neyman and Pearson). In one dimension, with x = 1/σ and
x' = −1/σ, the half line with that a attains both at once. Hence the antipodal pair on the line maximises
q E_x φ − α q E_x' φ + (1−q)(1−α) a for every a, and so H_α, for every α >= 0.

The privacy loss L(z) = log P(z)/Q(z) increases in z for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from common.privacy import checks

Array = NDArray[np.float64]
_ROOT = math.sqrt(2 * math.pi)


def _log_mixture(q: float, exponent: Array) -> Array:
    """Return log(1 − q + q e^exponent): accurate in relative terms where it is small, without overflow where large."""
    if q == 1:
        return np.asarray(exponent)
    log_ratio = np.log1p(q * np.expm1(np.minimum(exponent, 700.0)))
    if np.max(exponent) <= 700:
        return np.asarray(log_ratio)
    large = exponent + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(exponent, 700.0)))
    return np.asarray(np.where(exponent <= 700, log_ratio, large))


class Pair(Protocol):
    """A dominating pair on the line, parametrised by z; all methods are elementwise on arrays."""

    symmetric: ClassVar[bool]  # H_α(P‖Q) = H_α(Q‖P): one direction is enough

    @property
    def conditioning(self) -> float:
        """How many ulp of itself a computed loss may err by, in units of 4 ulp: 2 + log(1/q) + 1/σ²."""

    def density(self, z: Array) -> Array:
        """Return the density of Q at z."""

    def log_density(self, z: Array) -> Array:
        """Return the logarithm of the density of Q at z, also where the density underflows."""

    def loss(self, z: Array) -> Array:
        """Return L(z), also where e^L overflows."""

    def quantile(self, loss: Array) -> Array:
        """Return the z with L(z) = loss; −inf below the range of L."""

    def reach(self, width: float) -> tuple[float, float]:
        """Return [low, high] such that P and Q each put at most Φ(−width) below low, and above high."""

    def tails(self, low: float, high: float) -> tuple[float, float, float]:
        """Return Q(z < low), Q(z > high) and P(z > high)."""


@dataclass(frozen=True, slots=True)
class AddRemovePair:
    """Q = N(0,1) against P = (1−q) N(0,1) + q N(1/σ,1); see the module's docstring."""

    noise_multiplier: float
    sample_rate: float
    symmetric: ClassVar[bool] = False

    @property
    def conditioning(self) -> float:
        """2 + log(1/q) + 1/σ²: the size of the exponents behind a loss of size 1."""
        return 2 - math.log(self.sample_rate) + 1 / self.noise_multiplier**2

    def density(self, z: Array) -> Array:
        """Return φ(z)."""
        return np.asarray(np.exp(-0.5 * z * z) / _ROOT)

    def log_density(self, z: Array) -> Array:
        """Return log φ(z)."""
        return np.asarray(-0.5 * z * z - math.log(_ROOT))

    def loss(self, z: Array) -> Array:
        """L = log(1 + q (e^(z/σ − c) − 1)); small losses keep their relative accuracy."""
        return _log_mixture(self.sample_rate, z / self.noise_multiplier - 0.5 / self.noise_multiplier**2)

    def quantile(self, loss: Array) -> Array:
        """Z = σ log(1 + (e^loss − 1)/q) + 1/(2σ)."""
        q, sigma = self.sample_rate, self.noise_multiplier
        if q == 1:
            return np.asarray(sigma * loss + 0.5 / sigma)
        with np.errstate(divide="ignore"):
            log_ratio = np.log1p(np.maximum(np.expm1(loss) / q, -1.0))
        return np.asarray(sigma * log_ratio + 0.5 / sigma)

    def reach(self, width: float) -> tuple[float, float]:
        """Q is centred at 0, P reaches up to 1/σ."""
        return -width, width + 1 / self.noise_multiplier

    def tails(self, low: float, high: float) -> tuple[float, float, float]:
        """Normal tails, each accurate in relative terms."""
        q = self.sample_rate
        q_above = float(ndtr(-high))
        return float(ndtr(low)), q_above, (1 - q) * q_above + q * float(ndtr(1 / self.noise_multiplier - high))


@dataclass(frozen=True, slots=True)
class ReplaceOnePair:
    """Q = (1−q) N(0,1) + q N(−1/σ,1) against its mirror image P; see the module's docstring."""

    noise_multiplier: float
    sample_rate: float
    symmetric: ClassVar[bool] = True

    @property
    def conditioning(self) -> float:
        """2 + log(1/q) + 1/σ²: the size of the exponents behind a loss of size 1."""
        return 2 - math.log(self.sample_rate) + 1 / self.noise_multiplier**2

    def density(self, z: Array) -> Array:
        """φ(z) (1 − q) + q φ(z + 1/σ)."""
        sigma, q = self.noise_multiplier, self.sample_rate
        mixed = (1 - q) * np.exp(-0.5 * z * z) + q * np.exp(-0.5 * (z + 1 / sigma) ** 2)
        return np.asarray(mixed / _ROOT)

    def log_density(self, z: Array) -> Array:
        """log(φ(z) (1 − q) + q φ(z + 1/σ))."""
        sigma, q = self.noise_multiplier, self.sample_rate
        return np.asarray(-0.5 * z * z - math.log(_ROOT) + _log_mixture(q, -z / sigma - 0.5 / sigma**2))

    def loss(self, z: Array) -> Array:
        """Return the loss of P over N(0,1) at z, less that of Q over N(0,1)."""
        sigma, q = self.noise_multiplier, self.sample_rate
        c = 0.5 / sigma**2
        return np.asarray(_log_mixture(q, z / sigma - c) - _log_mixture(q, -z / sigma - c))

    def quantile(self, loss: Array) -> Array:
        """Z = σ (loss/2 + asinh((1−q) e^c sinh(loss/2) / q)): the root of a quadratic in e^(z/σ)."""
        sigma, q = self.noise_multiplier, self.sample_rate
        scale = (1 - q) / q * math.exp(0.5 / sigma**2)
        return np.asarray(sigma * (loss / 2 + np.arcsinh(scale * np.sinh(loss / 2))))

    def reach(self, width: float) -> tuple[float, float]:
        """Mirror images of each other, at ±1/σ."""
        high = width + 1 / self.noise_multiplier
        return -high, high

    def tails(self, low: float, high: float) -> tuple[float, float, float]:
        """Normal tails, each accurate in relative terms."""
        q, shift = self.sample_rate, 1 / self.noise_multiplier
        q_below = (1 - q) * float(ndtr(low)) + q * float(ndtr(low + shift))
        q_above = (1 - q) * float(ndtr(-high)) + q * float(ndtr(-high - shift))
        p_above = (1 - q) * float(ndtr(-high)) + q * float(ndtr(shift - high))
        return q_below, q_above, p_above


def dominating_pair(noise_multiplier: float, sample_rate: float, relation: checks.Relation) -> Pair:
    """Return the dominating pair of one step under ``relation`` (zero-out costs what add/remove costs)."""
    if checks.known_relation(relation) == "replace_one":
        if sample_rate == 1:  # N(±1/σ, 1) is N(0, 1) against N(2/σ, 1), moved
            return AddRemovePair(noise_multiplier / 2, 1.0)
        return ReplaceOnePair(noise_multiplier, sample_rate)
    return AddRemovePair(noise_multiplier, sample_rate)
