r"""δ(ε) of a composition, read off the inverse transform of its product of spectra.

The upper side is step 2 of the proof in ``pld``: δ(ε) <= I + C + e^(K−θε) Σ_j x_j c_j over the grid losses ℓ_j > ε of
the window, with x_j = e^(−θ(ℓ_j − ε)) − e^(−(θ+1)(ℓ_j − ε)), I the infinite losses and C the Chernoff bound above the
window.

*Floating error* of Σ x_j c_j, for every ε. With ΔG the error of the product of spectra, Parseval gives
|Σ x_j Δc_j| <= max_k |ΔG_k| · (1/N) Σ_k |X_k|. X, the transform of x, obeys |X_k| <= A = Σ x_j <= 1/(h θ(θ+1)) + 1 and,
summing by parts twice, |X_k| <= V/|1 − e^(2πik/N)|² <= V N²/(16 k²) for 1 <= |k| <= N/2, with
V = Σ |second differences of x| <= 4h + 2 x_N (the derivative of e^(−θt) − e^(−(θ+1)t) starts at 1, falls once below
0, by at most 1, and returns; x_N <= e^(−θ N h/8) is the jump where the window ends, as ε stays below 7/8 of it). So
(1/N) Σ |X_k| <= (2m+1) A/N + V N/(8m) for every whole m. The rounding of the inverse transform itself is at most (its
stages) · |c|_2 in norm, so at most |x|_2 |c|_2 times that, with |x|_2² <= A/(θ+1).

*The lower side* undoes the rounding of losses to the grid. Under the first distribution of a direction let X be the
true loss of a composition, X' its loss on the grid. A step's x = L' − L takes two values at most h apart, with
E[e^(−x) | z] = 1. So t -> log E[e^(t x) | z] vanishes at t = −1 and t = 0 and has second derivative at most h²/4,
hence is at most t(t+1) h²/8 for t >= 0. Over T steps, with A = T h²/8, P(X' − X > c) <= exp(A t(t+1) − t c) for every
t >= 0, which is η for c = A + 2 sqrt(A log(1/η)). Where X' − X <= c, (1 − e^(ε − X'))_+ <= (1 − e^(ε − c − X))_+;
elsewhere it is at most 1. Hence the grid's δ'(ε) <= δ(ε − c) + η, and an ε with δ'(ε) >= δ + η shows that the true ε
at δ is at least ε − c.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy import fft

from common.privacy.composition import Product
from common.privacy.discretise import ULP
from common.privacy.grids import Window
from common.privacy.pairs import Array

_LOWER_SHARE: Final = 1e-3  # η over δ
_NEAR: Final = 600.0
_LARGEST: Final = 650.0  # exponents are cut here: e^650 as a δ means "no bound" as well as e^6500 does


class Profile:
    """δ(ε) of a product of spectra within a window, rounded up (or, for ``epsilon_lower``, down)."""

    def __init__(self, product: Product, window: Window) -> None:
        self._directions = [_Direction(product, window, d) for d in range(len(window.grid.tilt))]

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε >= 0 with δ(ε) <= ``delta`` in both directions; infinite beyond the window."""
        return max(direction.epsilon(delta) for direction in self._directions)

    def steepness(self, epsilon: float, delta: float) -> float:
        """Return −d log δ / dε at ``epsilon``, the steeper direction (an estimate, to choose a finer grid by)."""
        return max(direction.steepness(epsilon, delta) for direction in self._directions)

    def delta(self, epsilon: float) -> float:
        """Return δ(``epsilon``), the larger of both directions."""
        return max(direction.delta(epsilon) for direction in self._directions)

    def epsilon_lower(self, delta: float) -> float:
        """Return an ε that the true one at ``delta`` is not below."""
        return max(direction.epsilon_lower(delta) for direction in self._directions)


class _Direction:
    """One direction of a profile: the tilted, folded distribution, tilted back."""

    def __init__(self, product: Product, window: Window, d: int) -> None:
        grid, self._tilt = window.grid, window.grid.tilt[d]
        self._grid, self._steps, self._moved = grid, product.steps, product.moved
        self._log_norm, self._log_tail = float(product.log_norm[d]), float(product.log_tail[d])
        self._slack = product.slack + 1e-12 * (1 + abs(self._log_norm) + abs(self._log_tail) + self._tilt)
        folded = fft.irfft(product.values[d], grid.size)
        self._loss: Array = np.arange(grid.size, dtype=np.float64) * grid.spacing
        # e^ε is written e^(ε − r) e^r, with r where e^(K − θr) = 1; far from r it would leave the doubles and is cut.
        self._reference = max(0.0, self._log_norm / self._tilt)
        self._growth = np.exp(np.clip(self._loss - self._reference, -_LARGEST, _LARGEST))
        self._far = self._loss - self._reference  # beyond ±600 nothing is read off the cut values
        tilted_back = np.exp(np.minimum(self._log_norm - self._tilt * self._loss, _LARGEST))  # e^(K − θ·loss)
        mass = folded * tilted_back
        self._above, self._discounted = _sums_above(mass), _sums_above(mass / self._growth)
        self._error = self._transform_error(folded) * tilted_back
        self._error += 4 * grid.size * ULP * _sums_above(np.abs(mass))
        chernoff = self._log_tail - grid.order * grid.size * grid.spacing + self._slack
        self._always = float(product.infinite[d]) + math.exp(min(0.0, chernoff))

    def _transform_error(self, folded: Array) -> float:
        """Return the bound on the floating error of Σ x_j c_j; see the module's docstring."""
        n, h, tilt = self._grid.size, self._grid.spacing, self._tilt
        stages = 10 * math.log2(n) * ULP
        total = 1 / (h * tilt * (tilt + 1)) + 1
        variation = 4 * h + 2 * math.exp(-tilt * h * n / 8)
        m = max(1, min(n // 2, math.ceil(n * math.sqrt(variation / (16 * total)))))
        spectral = (2 * m + 1) * total / n + variation * n / (8 * m)
        inverse = stages * math.sqrt(total / (tilt + 1)) * math.sqrt(float(np.square(folded).sum()))
        return 1.01 * (self._steps * (stages + 5 * ULP) * spectral + inverse)

    def _deltas(self) -> Array:
        """Return an upper bound on δ at every grid loss taken as ε."""
        finite = self._above - self._growth * self._discounted
        finite = np.where(self._far > _NEAR, self._above, np.where(self._far < -_NEAR, 1.0, finite))
        return np.asarray(self._always + (np.maximum(finite, 0) + self._error) * (1 + 2 * self._slack))

    def epsilon(self, delta: float) -> float:
        unmet = ~(self._deltas()[: self._usable()] <= delta)
        if unmet[-1]:
            return math.inf
        if not unmet.any():
            return 0.0
        last = int(np.flatnonzero(unmet)[-1])  # δ(ε) is met between this grid loss and the next
        if self._discounted[last] <= 0:
            return float(self._loss[last + 1])
        room = (delta - self._always) / (1 + 2 * self._slack) - self._error[last]
        ratio = (self._above[last] - room) / self._discounted[last]
        # Between grid losses δ(ε) = above − e^ε discounted; the grid loss itself is met, so the root lies below it.
        root = (self._reference + math.log(ratio)) * (1 + 1e-13) + 1e-15 if ratio > 0 else 0.0
        return min(max(0.0, root, float(self._loss[last])), float(self._loss[last + 1]))

    def _usable(self) -> int:
        """Return how many grid losses may serve as ε: those at least N h/8 below the window's end (x_N above)."""
        return self._grid.size * 7 // 8

    def steepness(self, epsilon: float, delta: float) -> float:
        below = min(int(epsilon / self._grid.spacing), self._grid.size - 1)
        return float(self._growth[below] * self._discounted[below] / delta)

    def delta(self, epsilon: float) -> float:
        below = int(epsilon / self._grid.spacing)
        if below >= self._usable() - 1:
            return 1.0
        if self._far[below] < -_NEAR:
            return 1.0
        growth = math.exp(epsilon - self._reference) if self._far[below] < _NEAR else 0.0
        finite = max(0.0, float(self._above[below] - growth * self._discounted[below]))
        return self._always + (finite * (1 + 1e-12) + float(self._error[below])) * (1 + 2 * self._slack)

    def epsilon_lower(self, delta: float) -> float:
        grid = self._grid
        length = grid.size * grid.spacing
        up = math.exp(-self._tilt * length)
        down = math.exp(min(0.0, -(grid.order - self._tilt) * length))
        if down > 0.5:
            return 0.0  # the Chernoff order does not bound what was folded down
        chernoff = np.exp(np.minimum(self._log_tail - grid.order * self._loss + self._slack, 0.0))
        finite = self._above - self._growth * self._discounted - self._error
        finite[np.abs(self._far) > _NEAR] = 0.0
        shown = finite * (1 - 2 * self._slack) - 2 * (up + chernoff * down) - self._moved
        enough = np.flatnonzero(shown[: self._usable()] >= delta * (1 + _LOWER_SHARE))
        if not len(enough):
            return 0.0
        variance = self._steps * grid.spacing**2 / 8
        shift = variance + 2 * math.sqrt(variance * -math.log(_LOWER_SHARE * delta))
        return max(0.0, float(self._loss[enough[-1]]) * (1 - 1e-12) - shift * (1 + 1e-12))


def _sums_above(mass: Array) -> Array:
    """Return Σ_(j > i) mass_j for every i."""
    total = np.zeros_like(mass)
    total[:-1] = np.cumsum(mass[:0:-1])[::-1]
    return total
