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
    p_θ(j): folding can only add. What folding misplaces is the mass above the window, at most
    C = e^(K(λ) − λ N h) for any λ > 0 (Chernoff, evaluated on the grid's own distributions); it is added to δ as it
    stands. So δ(ε) <= I + C + Σ_(ℓ_j > ε) (1 − e^(ε−ℓ_j)) e^(K(θ) − θ ℓ_j) c_j. (Folding's excess is at most e^(−θ N
    h), which is why the window can be short; it is on the safe side anyway.)
3.  Floating error. A transform of N = 2^m numbers is a product of m butterfly stages with two unit entries per row, so
    each output errs by at most 10 m u Σ|x| (u = 2^−53; Higham 2002, §24.1, in the form that bounds each output). Tilted
    spectra are bounded by 1, hence the product of T steps errs by at most T (10 m u + 5 u) in each entry (the
    multiplications cost 2.3 u each). ``profile`` turns that, and the rounding of the inverse transform, into a bound on
    δ(ε) that is added to it. Masses were raised by their own rounding error (``discretise``), exponents by theirs
    (``Spectrum.slack``, a factor e^slack per step), cumulative sums by 4 N u.

All of it is a function of the multiset of events and of δ alone: spacing, window, tilt and orders are chosen from
sums that do not depend on the order (exact integers), so regrouping moves ε only by the rounding of the products.

What the grid costs: splitting a loss over two neighbours raises K(θ) by at most θ(θ+1) h²/8 per step, on average
θ(θ+1) h²/12, hence ε by about (θ+1) T h²/12. The spacing keeps that below 5e-5 of ε where the transform may still grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final, Self

from common.privacy import checks, gdp
from common.privacy.composition import Composition
from common.privacy.events import SampledGaussian, checked
from common.privacy.grids import TOLERANCE
from common.privacy.profile import Profile

_REFINED: Final = 2**18  # a finer grid is tried only up to this many points
_LOWER_GAP: Final = 2e-3  # relative distance that the lower side aims at


class PLDAccountant:
    """Upper bound on ε from privacy loss distributions; the only accountant a budget decision may read.

    Accountants are values: ``compose`` returns a new one. What an accountant is, is its list of events; spectra are
    shared between all accountants of the process.

    Args:
        relation: ``add_remove``, ``zero_out`` (the same cost) or ``replace_one``.
    """

    __slots__ = ("_composition", "relation")

    def __init__(self, relation: checks.Relation = "add_remove") -> None:
        self.relation: checks.Relation = checks.known_relation(relation)
        self._composition = Composition(self.relation)

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

    def epsilon_lower(self, delta: float) -> float:
        """Return an ε that the smallest true one at ``delta`` is not below (for audits; see ``profile``).

        Raises:
            ValueError: for δ outside [1e-15, 1).
            TooLarge: (a ``ValueError``) if it cannot be computed soundly within the limits.
        """
        return self._answer("epsilon_lower", checks.delta_above_floor(delta=delta), self._epsilon_lower)

    def _answer(self, what: str, argument: float, compute: Callable[[float], float]) -> float:
        return self._composition.answer(what, argument, compute) if self._composition.counts else 0.0

    def _epsilon(self, delta: float) -> float:
        if self._composition.only_gaussian():
            return gdp.gdp_epsilon(self._composition.gaussian_mu(), delta)
        window, best = self._composition.window(delta), math.inf
        while True:
            grid = window.grid
            profile = Profile(self._composition.product(grid), window)
            best = min(best, profile.epsilon(delta))  # each is an upper bound
            if best == 0 or math.isinf(best):
                return best
            error = window.error(profile.steepness(best, delta))
            if error <= 4 * TOLERANCE * best or grid.size >= _REFINED:
                return best
            spacing = grid.spacing * max(math.sqrt(TOLERANCE * best / error), grid.size / _REFINED)
            window = self._composition.window(delta, spacing=spacing)

    def _delta(self, epsilon: float) -> float:
        if self._composition.only_gaussian():
            return gdp.gdp_delta(self._composition.gaussian_mu(), epsilon)
        window, at = self._composition.window_at(epsilon)
        return min(1.0, Profile(self._composition.product(window.grid), window).delta(at))

    def _epsilon_lower(self, delta: float) -> float:
        if self._composition.only_gaussian():
            return gdp.gdp_epsilon(self._composition.gaussian_mu(), delta) * (1 - 1e-9)
        upper = self.epsilon(delta)
        if upper == 0 or math.isinf(upper):
            return 0.0
        coarse = self._composition.window(delta).grid
        wanted = _LOWER_GAP * upper / math.sqrt(2 * self._composition.steps * -math.log(1e-3 * delta))
        spacing = min(coarse.spacing, max(wanted, coarse.spacing * coarse.size / _REFINED))
        window = self._composition.window(delta, spacing=spacing)
        return Profile(self._composition.product(window.grid), window).epsilon_lower(delta)
