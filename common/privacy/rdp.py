r"""Rényi differential privacy of the Poisson-sampled Gaussian, and its conversion to (ε, δ).

A step's Rényi divergence of order α > 1 is log E_Q[(P/Q)^α] / (α − 1) for its dominating pair (``pairs``). For
add/remove the direction P‖Q is the larger one (Mironov, Talwar, Zhang 2019, Theorem 5 and §3.3); replace-one is
symmetric. Divergences of one order add up under composition, also when later steps look at earlier outputs.
The conversion is Proposition 12 of Canonne, Kamath, Steinke 2020:

    ε = ρ(α) + log(1 − 1/α) − (log δ + log α)/(α − 1),   the smallest over the orders.

>>> from common.privacy import SampledGaussian
>>> round(RDPAccountant().compose(SampledGaussian(1.0, 0.01, 1000)).epsilon(1e-5), 3)
2.101
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, Self

import numpy as np
from scipy.special import gammaln

from common.privacy import checks, gdp
from common.privacy.discretise import log_sum_exp
from common.privacy.events import SampledGaussian, checked
from common.privacy.pairs import AddRemovePair, Array, ReplaceOnePair

DEFAULT_ORDERS: Final[tuple[float, ...]] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(x) for x in range(11, 64)),
    *(64.0, 72.0, 80.0, 96.0, 112.0, 128.0, 160.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0),
)
# Sums of thousands of positive terms in logarithms, and a trapezoid rule that has converged: both are good
# to a few hundred ulp of the logarithm's size; divergences are raised by this.
_SLACK: Final = 1e-11
_REPLACE_ONE_HIGHEST: Final = 64.0  # its integrals reach (2α − 1)/σ; higher orders are left out when sampled


class RDPAccountant:
    """Upper bound on ε from Rényi divergences at fixed orders; looser than PLD, and an independent witness.

    Args:
        relation: ``add_remove``, ``zero_out`` (the same cost) or ``replace_one``.
        orders: Rényi orders, each finite and > 1.
    """

    __slots__ = ("_divergence", "events", "orders", "relation")

    def __init__(self, relation: checks.Relation = "add_remove", *, orders: Sequence[float] = DEFAULT_ORDERS) -> None:
        self.relation: checks.Relation = checks.known_relation(relation)
        self.orders = tuple(float(order) for order in orders)
        if not self.orders or not all(math.isfinite(order) and order > 1 for order in self.orders):
            raise ValueError(f"orders must be finite numbers > 1, got {orders!r}")
        self.events: tuple[SampledGaussian, ...] = ()
        self._divergence: Array = np.zeros(len(self.orders))

    def compose(self, *events: SampledGaussian) -> Self:
        """Return an accountant that has also seen ``events``; nothing changes if one of them is refused.

        Raises:
            ValueError: for anything that is not an event.
        """
        return self.compose_all(events)

    def compose_all(self, events: Iterable[SampledGaussian]) -> Self:
        """Return an accountant that has also seen every event of the iterable; see :meth:`compose`."""
        added = checked(events)
        child = type(self)(self.relation, orders=self.orders)
        child.events = self.events + added
        total = self._divergence
        for event in added:
            total = total + event.steps * rdp(event.noise_multiplier, event.sample_rate, self.orders, self.relation)
        child._divergence = total
        return child

    def divergences(self) -> Array:
        """Return the composed Rényi divergence at each order, in nats; shape [orders]."""
        return np.array(self._divergence)

    def epsilon(self, delta: float) -> float:
        """Return an ε such that the composition is (ε, ``delta``)-DP.

        Raises:
            ValueError: for δ outside [1e-15, 1).
        """
        delta = checks.delta_above_floor(delta=delta)
        return rdp_epsilon(self.orders, self._divergence, delta) if self.events else 0.0

    def delta(self, epsilon: float) -> float:
        """Return a δ such that the composition is (``epsilon``, δ)-DP.

        Raises:
            ValueError: for ε < 0 or not finite.
        """
        epsilon = checks.nonnegative(epsilon=epsilon)
        return rdp_delta(self.orders, self._divergence, epsilon) if self.events else 0.0


def rdp_epsilon(orders: Sequence[float], divergences: Array, delta: float) -> float:
    """Return the best conversion over ``orders`` to ε at ``delta`` (Canonne et al. 2020, Proposition 12)."""
    a = np.asarray(orders)
    candidates = divergences + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    # δ <= sqrt(1 − e^(−KL)) (Bretagnolle and Huber 1979), and KL is at most every divergence of order > 1.
    if -math.expm1(-float(np.min(divergences))) <= delta * delta:
        return 0.0
    return max(0.0, float(np.min(candidates)))


def rdp_delta(orders: Sequence[float], divergences: Array, epsilon: float) -> float:
    """Return the best conversion over ``orders`` to δ at ``epsilon`` (Canonne et al. 2020, Proposition 12)."""
    a = np.asarray(orders)
    log_delta = float(np.min((a - 1) * (divergences - epsilon + np.log1p(-1 / a)) - np.log(a)))
    total_variation = math.sqrt(-math.expm1(-float(np.min(divergences))))
    return min(1.0, total_variation, math.exp(min(0.0, log_delta)))


@lru_cache(maxsize=4096)
def _rdp(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...], relation: checks.Relation) -> Array:
    a = np.asarray(orders)
    if sample_rate == 1:
        return np.asarray(a * (gdp.sensitivity(relation) / noise_multiplier) ** 2 / 2 * (1 + _SLACK))
    log_moment = np.full(len(a), np.inf)
    if relation == "replace_one":
        chosen = a <= _REPLACE_ONE_HIGHEST
        log_moment[chosen] = _by_quadrature(ReplaceOnePair(noise_multiplier, sample_rate), a[chosen])
    else:
        whole = a == np.floor(a)
        log_moment[whole] = _by_binomial(noise_multiplier, sample_rate, a[whole])
        log_moment[~whole] = _by_quadrature(AddRemovePair(noise_multiplier, sample_rate), a[~whole])
    return np.asarray((log_moment * (1 + _SLACK) + 1e-15 * a * sample_rate) / (a - 1))


def rdp(noise_multiplier: float, sample_rate: float, orders: Sequence[float], relation: checks.Relation) -> Array:
    """Return one step's Rényi divergence at each order, in nats, rounded up; shape [orders].

    Args:
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        orders: Rényi orders > 1.
        relation: neighbouring relation.
    """
    return _rdp(noise_multiplier, sample_rate, tuple(orders), relation)


def _by_binomial(sigma: float, q: float, orders: Array) -> Array:
    """Log E_Q[(P/Q)^α] for whole α (Mironov et al. 2019, §3.3), as log(1 + S) with S a sum of positive terms.

    E_Q[(P/Q)^α] = Σ_k C(α,k) q^k (1−q)^(α−k) e^(k(k−1)/(2σ²)); taking 1 = Σ_k C(α,k) q^k (1−q)^(α−k) away leaves
    S = Σ_(k >= 2) C(α,k) q^k (1−q)^(α−k) (e^(k(k−1)/(2σ²)) − 1).
    """
    log_moment = np.zeros(len(orders))
    small = orders <= 64  # two blocks: a dense table up to the largest order would be mostly empty
    for block in (small, ~small):
        if block.any():
            order = orders[block][:, None]
            k, log_choose = _binomials(tuple(orders[block].tolist()))
            exponent = k * (k - 1) / (2 * sigma**2)
            log_gain = exponent + np.log(-np.expm1(-exponent))
            terms = log_choose + k * math.log(q) + (order - k) * math.log1p(-q) + log_gain
            log_moment[block] = np.logaddexp(0.0, log_sum_exp(terms))
    return log_moment


@lru_cache(maxsize=16)
def _binomials(orders: tuple[float, ...]) -> tuple[Array, Array]:
    """Return k = 2 … max(orders) and log C(order, k), −inf for k > order; shapes [k], [orders, k]."""
    order, k = np.array(orders)[:, None], np.arange(2, max(orders) + 1)
    inside = np.maximum(order - k, 0)
    log_choose = gammaln(order + 1) - gammaln(k + 1) - gammaln(inside + 1)
    return k, np.where(k <= order, log_choose, -np.inf)


def _by_quadrature(pair: AddRemovePair | ReplaceOnePair, orders: Array) -> Array:
    """Log E_Q[e^(α L)] by the trapezoid rule, as log(1 + S) with S = E_Q[e^(α L) − 1 − α (e^L − 1)] >= 0.

    The integrand is analytic in the strip |Im z| < πσ, so steps of σ/4 leave an error of e^(−8π²) (Trefethen and
    Weideman 2014, Theorem 5.1); the mass beyond 12 standard deviations of the outermost bump is below 1e-32 of it.
    """
    if not len(orders):
        return np.zeros(0)
    sigma = pair.noise_multiplier
    highest = float(orders.max()) * (2 if pair.symmetric else 1) / sigma
    lowest = -1 / sigma if pair.symmetric else 0.0
    step = min(0.4, sigma / 4)
    z = np.arange(lowest - 12, highest + 12, step)
    log_weight, loss = pair.log_density(z) + math.log(step), pair.loss(z)
    exponent = orders[:, None] * loss
    near = np.minimum(exponent, 30.0)
    gain = np.expm1(near) - orders[:, None] * np.expm1(np.minimum(loss, 30.0))
    with np.errstate(divide="ignore"):
        log_gain = np.where(exponent < 30, np.log(np.maximum(gain, 0)), exponent)
    return np.asarray(np.logaddexp(0.0, log_sum_exp(log_weight + log_gain)))
