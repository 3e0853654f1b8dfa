r"""The certified number: privacy loss distributions, rounded against us and composed exactly.

>>> from common.privacy import SampledGaussian
>>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
>>> round(PLDAccountant().compose(event).epsilon(delta=1e-5), 3)
1.828

Why ``epsilon`` is an upper bound
---------------------------------
1.  Each step is dominated by a pair on the line, in both orders (``pairs``), and that pair by one on the grid
    ih (``discretise``). Composition keeps domination, so the true δ(ε) is at most, in the worse direction,
    I + E[(1 − e^(ε − X)); X > ε]. Here X is the sum of the steps' finite grid losses under the first distribution
    and I <= Σ steps · (probability of infinite loss).
2.  Let p be the distribution of X, K(λ) = log E[e^(λX)] (a sum over steps) and p_θ = p e^(θ·loss − K(θ)) the
    tilted one. The product of the steps' tilted spectra is the spectrum of c_j = Σ_m p_θ(j + mN), which is at least
    p_θ(j): folding can only add. The mass above the window's top, which folding misplaces, is at most
    e^(K(λ) − λ·top) for any λ > 0 (Chernoff, evaluated on the grid's own distributions) and is added to δ as it stands.
    So δ(ε) <= I + e^(K(λ) − λ·top) + Σ_(ε < ℓ_j <= top) (1 − e^(ε−ℓ_j)) e^(K(θ) − θ ℓ_j) c_j.
    (Folding's excess is at most e^(−θ N h), which is why the window can be short; it is on the safe side anyway.)
3.  Floating error. A transform of N = 2^m numbers is a product of m butterfly stages with two unit entries per row, so
    each output errs by at most 10 m u Σ|x| (u = 2^−53; Higham 2002, §24.1, in the form that bounds each output). Tilted
    spectra are bounded by 1, hence the product of T steps errs by at most T (10 m u + 5 u) in each entry (the
    multiplications cost 2.3 u each), and its inverse transform, an average over entries, by that plus 10 m u.
    This η is added to every c_j before it is used. Masses were raised by their own rounding error (``discretise``),
    exponents by theirs (``Spectrum.slack``, a factor e^slack per step), the two cumulative sums by 4 N u.

All of it is a function of the multiset of events and of δ alone: spacing, window, tilt and orders are chosen from
sums that do not depend on the order (exact integers), so regrouping moves ε only by the rounding of the products.

What the grid costs: splitting a loss over two neighbours raises K(θ) by at most θ(θ+1) h²/8 per step, on average
θ(θ+1) h²/12, hence ε by about (θ+1) T h²/12. The spacing keeps that below 5e-5 of ε where the transform may still grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final, Self

import numpy as np
from scipy import fft

from common.privacy import checks, gdp
from common.privacy.composition import TOLERANCE, Composition, Product
from common.privacy.discretise import ULP
from common.privacy.events import SampledGaussian, checked
from common.privacy.pairs import Array
from common.privacy.spectrum import Grid

_REFINED: Final = 2**18  # a finer grid is tried only up to this many points


class PLDAccountant:
    """Upper bound on ε from privacy loss distributions; the only accountant a budget decision may read.

    Accountants are values: ``compose`` returns a new one. What an accountant is, is its list of events; spectra are
    shared between all accountants of the process.

    Args:
        relation: ``add_remove``, ``zero_out`` (the same cost) or ``replace_one``.
    """

    __slots__ = ("_answers", "_composition", "relation")

    def __init__(self, relation: checks.Relation = "add_remove") -> None:
        self.relation: checks.Relation = checks.known_relation(relation)
        self._composition = Composition(self.relation)
        self._answers: dict[tuple[str, float], float] = {}

    @property
    def events(self) -> tuple[SampledGaussian, ...]:
        """What was composed, in order."""
        return self._composition.events

    def compose(self, *events: SampledGaussian) -> Self:
        """Return an accountant that has also seen ``events``; nothing changes if one of them is refused.

        Raises:
            ValueError: for anything that is not an event.
        """
        return self.compose_all(events)

    def compose_all(self, events: Iterable[SampledGaussian]) -> Self:
        """Return an accountant that has also seen every event of the iterable; see :meth:`compose`."""
        child = type(self)(self.relation)
        child._composition = self._composition.extended(checked(events))
        return child

    def epsilon(self, delta: float) -> float:
        """Return an ε such that the composition is (ε, ``delta``)-DP: never below the smallest such ε.

        Raises:
            ValueError: for δ outside [1e-15, 1).
            TooLarge: (a ``ValueError``) if it cannot be computed soundly within the limits.
        """
        return self._answer("epsilon", checks.delta_above_floor(delta=delta), self._epsilon)

    def delta(self, epsilon: float) -> float:
        """Return a δ such that the composition is (``epsilon``, δ)-DP: never below the smallest such δ.

        Raises:
            ValueError: for ε < 0 or not finite.
            TooLarge: (a ``ValueError``) if it cannot be computed soundly within the limits.
        """
        return self._answer("delta", checks.nonnegative(epsilon=epsilon), self._delta)

    def _answer(self, what: str, argument: float, compute: Callable[[float], float]) -> float:
        if not self._composition.counts:
            return 0.0
        if (what, argument) not in self._answers:
            self._answers[what, argument] = compute(argument)
        return self._answers[what, argument]

    def _epsilon(self, delta: float) -> float:
        if self._composition.only_gaussian():
            return gdp.gdp_epsilon(self._composition.gaussian_mu(), delta)
        grid = self._composition.grid(delta)
        while True:
            epsilon = Profile(self._composition.product(grid), grid).epsilon(delta)
            error = (max(grid.tilt) + 1) * self._composition.steps * grid.spacing**2 / 12
            if error <= 2 * TOLERANCE * epsilon or epsilon == 0 or 2 * grid.size > _REFINED:
                return epsilon
            finer = self._composition.grid(delta, spacing=grid.spacing * math.sqrt(TOLERANCE * epsilon / error))
            if finer.size > _REFINED:
                finer = self._composition.grid(delta, spacing=grid.spacing * grid.size / _REFINED)
            grid = finer

    def _delta(self, epsilon: float) -> float:
        if self._composition.only_gaussian():
            return gdp.gdp_delta(self._composition.gaussian_mu(), epsilon)
        grid = self._composition.grid(self._composition.rough_delta(epsilon), reach=epsilon)
        return min(1.0, Profile(self._composition.product(grid), grid).delta(epsilon))


class Profile:
    """δ(ε) of a product of spectra: the sums of step 2 of the module's proof, on the grid's own losses."""

    def __init__(self, product: Product, grid: Grid) -> None:
        self._directions = [_Direction(product, grid, d) for d in range(len(grid.top))]

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε >= 0 with δ(ε) <= ``delta`` in both directions."""
        return max(direction.epsilon(delta) for direction in self._directions)

    def delta(self, epsilon: float) -> float:
        """Return δ(``epsilon``), the larger of both directions."""
        return max(direction.delta(epsilon) for direction in self._directions)


class _Direction:
    def __init__(self, product: Product, grid: Grid, d: int) -> None:
        top, h, tilt = grid.top[d], grid.spacing, grid.tilt[d]
        stages = 10 * math.log2(grid.size) * ULP
        noise = (product.steps * (stages + 5 * ULP) + stages) * 1.01
        folded = fft.irfft(product.values[d], grid.size)[: top + 1] + noise
        self.loss = np.arange(top + 1) * h
        exponent = product.log_norm[d] - tilt * self.loss + product.slack
        mass = np.maximum(folded, 0) * np.exp(np.minimum(exponent + 1e-12 * np.abs(exponent), 600))
        beyond = product.log_tail[d] - grid.order[d] * top * h
        self.always = float(product.infinite[d] + math.exp(min(0.0, beyond + product.slack + 1e-12 * abs(beyond))))
        rounding = 4 * grid.size * ULP
        self.above = _sums_above(mass) * (1 + rounding)
        self.discounted = _sums_above(mass * np.exp(-self.loss)) * (1 - rounding)

    def deltas(self) -> Array:
        """Return δ at every grid loss taken as ε; non-increasing up to rounding."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self.always + self.above - np.exp(self.loss) * self.discounted)

    def epsilon(self, delta: float) -> float:
        met = self.deltas() <= delta
        if not met[-1]:
            return math.inf
        last_unmet = len(met) - 1 - int(np.argmax(~met[::-1])) if not met.all() else -1
        if last_unmet < 0:
            return 0.0
        ratio = (self.always + self.above[last_unmet] - delta) / self.discounted[last_unmet]
        return max(0.0, math.log(ratio) * (1 + 1e-13))

    def delta(self, epsilon: float) -> float:
        """Return δ(``epsilon``); 1 where ε lies above the window."""
        below = int(epsilon / self.loss[1])
        if below >= len(self.loss) - 1:
            return 1.0
        return self.always + max(0.0, float(self.above[below] - math.exp(epsilon) * self.discounted[below]))


def _sums_above(mass: Array) -> Array:
    """Return Σ_(j > i) mass_j for every i."""
    total = np.zeros_like(mass)
    total[:-1] = np.cumsum(mass[:0:-1])[::-1]
    return total
