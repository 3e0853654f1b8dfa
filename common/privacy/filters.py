"""What to spend when rounds are chosen along the way: filters that are fixed before the first round.

Where the noise, the sample rate or the number of steps of a round depends on earlier outputs, composing the events that
happened to be chosen (path-wise PLD) proves nothing: a two-round example with δ = 1.00e-3 on every branch reaches
1.54e-3 (tests/privacy/test_filters.py; Tran, Koskela, Räisä, Honkela 2026). A filter is tested *before* each round
and stays valid for any such choice:

* ``GDPFilter``: unsampled Gaussians; Σ (s/σ_t)² <= μ², without loss (Smith, Thakurta 2022; Koskela et al. 2023).
* ``RenyiFilter``: Poisson-sampled Gaussians; Σ ρ_t(α) <= B at one order α named in advance (Feldman, Zrnic 2021).
* ``EnvelopeFilter``: a list of worst cases fixed in advance; every round must stay below its own. What is charged is
  the list, by PLD. Less sampling, more noise or fewer steps are post-processing of the worst case: replace the output
  by a fresh draw from Q with some probability, add noise, or drop steps.

>>> round(GDPFilter(target_epsilon=8.0, target_delta=1e-5).mu, 4)
1.666
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from common.privacy import checks, gdp
from common.privacy.events import SampledGaussian, checked
from common.privacy.pld import PLDAccountant
from common.privacy.rdp import DEFAULT_ORDERS, rdp

_SLACK: Final = 1e-12  # relative; sums of floats are raised by it before they are compared


class FilterExhausted(ValueError):
    """The event asked for does not fit into what the filter has left; nothing was spent."""


@dataclass(frozen=True)
class GDPFilter:
    """Admits unsampled Gaussian events, chosen adaptively, while Σ steps · (s/σ)² <= μ².

    Attributes:
        target_epsilon, target_delta: the budget, fixed before the first round.
        relation: neighbouring relation; fixes s.
        spent: what was admitted so far.
    """

    target_epsilon: float
    target_delta: float
    relation: checks.Relation = "add_remove"
    spent: tuple[SampledGaussian, ...] = ()

    def __post_init__(self) -> None:
        checks.known_relation(self.relation)
        gdp.gdp_mu(self.target_epsilon, self.target_delta)

    @property
    def mu(self) -> float:
        """μ of the whole budget: the exact Gaussian inverse of (ε, δ)."""
        return gdp.gdp_mu(self.target_epsilon, self.target_delta)

    def fits(self, event: SampledGaussian) -> bool:
        """Return whether ``event`` may still run.

        Raises:
            ValueError: if it is sampled: a Poisson-sampled step is not μ-GDP with a useful μ.
        """
        total = gdp.composed_mu((*self.spent, *checked([event])), self.relation)
        return total * (1 + _SLACK) <= self.mu

    def spend(self, event: SampledGaussian) -> Self:
        """Return the filter with ``event`` charged.

        Raises:
            FilterExhausted: if it does not fit.
        """
        return replace(self, spent=_admitted(self.fits(event), self.spent, event))


@dataclass(frozen=True)
class RenyiFilter:
    """Admits events, chosen adaptively, while their Rényi divergences of one order add up to at most the budget.

    Attributes:
        order: α > 1, named before the first round (see :func:`best_order`); choosing it afterwards is not covered.
        target_epsilon, target_delta: the budget, fixed before the first round.
        relation: neighbouring relation.
        spent: what was admitted so far.
    """

    order: float
    target_epsilon: float
    target_delta: float
    relation: checks.Relation = "add_remove"
    spent: tuple[SampledGaussian, ...] = ()

    def __post_init__(self) -> None:
        checks.known_relation(self.relation)
        if not (math.isfinite(self.order) and self.order > 1):
            raise ValueError(f"order must be a finite number > 1, got {self.order!r}")
        if self.budget <= 0:
            raise ValueError(
                f"order {self.order:g} leaves no room for ε = {self.target_epsilon:g} at δ = {self.target_delta:g}: "
                f"choose a larger one (see best_order)"
            )

    @property
    def budget(self) -> float:
        """B in nats, the largest ρ(α) whose conversion is at most ε (Canonne et al. 2020, Proposition 12)."""
        epsilon = checks.positive(target_epsilon=self.target_epsilon)
        delta = checks.delta_above_floor(target_delta=self.target_delta)
        a = self.order
        return epsilon - math.log1p(-1 / a) + (math.log(delta) + math.log(a)) / (a - 1)

    def divergence(self, events: Sequence[SampledGaussian]) -> float:
        """Return Σ ρ(α) of ``events`` in nats."""
        each = [
            event.steps * float(rdp(event.noise_multiplier, event.sample_rate, (self.order,), self.relation)[0])
            for event in checked(events)
        ]
        return math.fsum(each)

    def fits(self, event: SampledGaussian) -> bool:
        """Return whether ``event`` may still run."""
        return self.divergence((*self.spent, event)) * (1 + _SLACK) <= self.budget

    def spend(self, event: SampledGaussian) -> Self:
        """Return the filter with ``event`` charged.

        Raises:
            FilterExhausted: if it does not fit.
        """
        return replace(self, spent=_admitted(self.fits(event), self.spent, event))

    def rounds_of(self, event: SampledGaussian) -> int:
        """Return how many times ``event`` alone would fit into the whole budget."""
        return int(self.budget / (self.divergence([event]) * (1 + _SLACK)))


@dataclass(frozen=True)
class EnvelopeFilter:
    """Admits, round by round, events that stay below a worst case fixed in advance; the list of worst cases is charged.

    Attributes:
        worst: the worst event of each round, fixed before the first one.
        relation: neighbouring relation.
        spent: what was admitted so far; round t is compared with ``worst[t]``.
    """

    worst: tuple[SampledGaussian, ...]
    relation: checks.Relation = "add_remove"
    spent: tuple[SampledGaussian, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "worst", checked(self.worst))
        checks.known_relation(self.relation)

    def fits(self, event: SampledGaussian) -> bool:
        """Return whether ``event`` stays within the worst case of the next round."""
        checked([event])
        if len(self.spent) >= len(self.worst):
            return False
        bound = self.worst[len(self.spent)]
        return (
            event.sample_rate <= bound.sample_rate
            and event.noise_multiplier >= bound.noise_multiplier
            and event.steps <= bound.steps
        )

    def spend(self, event: SampledGaussian) -> Self:
        """Return the filter with ``event`` admitted.

        Raises:
            FilterExhausted: if it leaves the envelope, or all rounds are used.
        """
        return replace(self, spent=_admitted(self.fits(event), self.spent, event))

    def epsilon(self, delta: float) -> float:
        """Return the certified ε of the whole envelope, whatever was chosen inside it."""
        return PLDAccountant(self.relation).compose_all(self.worst).epsilon(delta)


def _admitted(fits: bool, spent: tuple[SampledGaussian, ...], event: SampledGaussian) -> tuple[SampledGaussian, ...]:
    if not fits:
        raise FilterExhausted(f"{event} does not fit: {len(spent)} events were admitted before it")
    return (*spent, event)


def best_order(
    planned: Sequence[SampledGaussian],
    *,
    target_epsilon: float,
    target_delta: float,
    relation: checks.Relation = "add_remove",
    orders: Sequence[float] = DEFAULT_ORDERS,
) -> float:
    """Return the order at which a planned list uses the smallest share of a Rényi filter's budget.

    Call it on the plan, before the first round, and name the order it returns; the filter is then valid whatever the
    rounds turn out to be, and best if they are as planned.

    Raises:
        ValueError: if no order leaves a budget.
    """
    shares: dict[float, float] = {}
    for order in orders:
        try:
            held = RenyiFilter(order, target_epsilon, target_delta, relation)
        except ValueError:
            continue
        shares[order] = held.divergence(planned) / held.budget
    if not shares:
        raise ValueError(f"no order leaves room for ε = {target_epsilon!r} at δ = {target_delta!r}")
    return min(shares, key=shares.__getitem__)
