"""δ(ε) of a composition, read off the inverse transform of its product of spectra.

The upper side is step 2 of the proof in ``pld``. The lower side undoes the rounding of losses to the grid:

Under the first distribution of a direction let X be the true loss of a composition, X' its loss on the grid. A step's
x = L' − L takes two values at most h apart, with E[e^(−x) | z] = 1. So t -> log E[e^(t x) | z] vanishes at t = −1 and
t = 0 and has second derivative at most h²/4, hence is at most t(t+1) h²/8 for t >= 0. Over T steps, with A = T h²/8,
P(X' − X > c) <= exp(A t(t+1) − t c) for every t >= 0, which is η for c = A + 2 sqrt(A log(1/η)). Where X' − X <= c,
(1 − e^(ε − X'))_+ <= (1 − e^(ε − c − X))_+; elsewhere it is at most 1. Hence the grid's δ'(ε) <= δ(ε − c) + η, and an ε
with δ'(ε) >= δ + η shows that the true ε at δ is at least ε − c.
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


class Profile:
    """δ(ε) of a product of spectra within a window, rounded up (or, for ``epsilon_lower``, down)."""

    def __init__(self, product: Product, window: Window) -> None:
        self._directions = [_Direction(product, window, d) for d in range(len(window.grid.tilt))]

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε >= 0 with δ(ε) <= ``delta`` in both directions; infinite beyond the window."""
        return max(direction.epsilon(delta) for direction in self._directions)

    def delta(self, epsilon: float) -> float:
        """Return δ(``epsilon``), the larger of both directions."""
        return max(direction.delta(epsilon) for direction in self._directions)

    def epsilon_lower(self, delta: float) -> float:
        """Return an ε that the true one at ``delta`` is not below."""
        return max(direction.epsilon_lower(delta) for direction in self._directions)


class _Direction:
    """One direction of a profile: the tilted, folded distribution, tilted back."""

    def __init__(self, product: Product, window: Window, d: int) -> None:
        grid, top = window.grid, window.top
        stages = 10 * math.log2(grid.size) * ULP
        self.noise = (product.steps * (stages + 5 * ULP) + stages) * 1.01
        self.folded = fft.irfft(product.values[d], grid.size)[: top + 1]
        self.loss = np.arange(top + 1) * grid.spacing
        self.exponent = np.minimum(product.log_norm[d] - grid.tilt[d] * self.loss, 600.0)
        self.uncertain = product.slack + 1e-12 * (1 + float(np.max(np.abs(self.exponent))))
        self.rounding = 4 * grid.size * ULP
        beyond = product.log_tail[d] - grid.order * (top + 1) * grid.spacing  # the next loss after the top
        self.always = float(product.infinite[d]) + math.exp(min(0.0, beyond + self.uncertain + 1e-12 * abs(beyond)))
        mass = np.maximum(self.folded + self.noise, 0) * np.exp(self.exponent + self.uncertain)
        self.above = _sums_above(mass) * (1 + self.rounding)
        self.discounted = _sums_above(mass * np.exp(-self.loss)) * (1 - self.rounding)
        self._product, self._grid, self._d = product, grid, d

    def epsilon(self, delta: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            unmet = ~(self.always + self.above - np.exp(self.loss) * self.discounted <= delta)
        if unmet[-1]:
            return math.inf
        if not unmet.any():
            return 0.0
        last = int(np.flatnonzero(unmet)[-1])  # δ(ε) is met between this grid loss and the next
        ratio = (self.always + self.above[last] - delta) / self.discounted[last]
        return max(0.0, math.log(ratio) * (1 + 1e-13) + 1e-15)

    def delta(self, epsilon: float) -> float:
        below = int(epsilon / self.loss[1])
        if below >= len(self.loss) - 1:
            return 1.0
        finite = float(self.above[below] - math.exp(epsilon) * self.discounted[below])
        return self.always + max(0.0, finite) * (1 + 1e-12)

    def epsilon_lower(self, delta: float) -> float:
        product, grid, d = self._product, self._grid, self._d
        length = grid.size * grid.spacing
        ratio_up = math.exp(-grid.tilt[d] * length)
        ratio_down = math.exp(min(0.0, -(grid.order - grid.tilt[d]) * length))
        if ratio_down > 0.5:
            return 0.0  # the Chernoff order does not bound what was folded down
        mass = np.maximum(self.folded - self.noise, 0) * np.exp(self.exponent - self.uncertain)
        above = _sums_above(mass) * (1 - self.rounding)
        discounted = _sums_above(mass * np.exp(-self.loss)) * (1 + self.rounding)
        chernoff = np.exp(np.minimum(product.log_tail[d] - grid.order * self.loss + self.uncertain, 0.0))
        folded_in = 2 * (ratio_up + chernoff * ratio_down)
        shown = above - np.exp(np.minimum(self.loss, 700)) * discounted - folded_in - product.moved
        enough = np.flatnonzero(shown >= delta * (1 + _LOWER_SHARE))
        if not len(enough):
            return 0.0
        variance = product.steps * grid.spacing**2 / 8
        shift = variance + 2 * math.sqrt(variance * -math.log(_LOWER_SHARE * delta))
        return max(0.0, float(self.loss[enough[-1]]) * (1 - 1e-12) - shift * (1 + 1e-12))


def _sums_above(mass: Array) -> Array:
    """Return Σ_(j > i) mass_j for every i."""
    total = np.zeros_like(mass)
    total[:-1] = np.cumsum(mass[:0:-1])[::-1]
    return total
