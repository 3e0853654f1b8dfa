r"""One step's privacy loss on a grid, rounded against us (connect the dots), and its moments.

*Connect the dots* (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022). Write α = e^L. An outcome with
Q-mass dQ and ratio α between two grid values α_i = e^(ih) <= α <= α_(i+1) is replaced by two outcomes, with
Q-mass dQ·(α_(i+1) − α)/(α_(i+1) − α_i) at α_i and the rest at α_(i+1). That keeps both its Q-mass and its
P-mass (α dQ), and only adds information (merging the two gives the outcome back), so the pair on the grid
dominates the true one, in both directions. One array U_i of Q-masses therefore serves both:

    direction P‖Q ("remove"): loss  ih with probability e^(ih) U_i,
    direction Q‖P ("add"):    loss −ih with probability U_i.

Adding mass to any U_i, or counting mass as infinite loss, can only raise every hockey-stick divergence.
That is how the tails are treated: what lies outside the grid is added to the nearest grid value that is worse
(for the low tail: to the two lowest values, one of which is worse in each direction), and its probability is
also counted as infinite loss in the direction in which it is a high loss.

U_i = ∫ hat_i(α(z)) dQ(z) is computed by Gauss–Legendre quadrature on the pieces between grid values, cut to
at most 0.08 standard deviations, so that the integrand is smooth on each. Positive terms only: no cancellation.
The error of n nodes on a piece of width w is w^(2n+1) (n!)^4 / ((2n+1) ((2n)!)^3) times the 2n-th derivative; for a
normal density at |z| <= 10 that is below 1e-10 of the mass, with four nodes for w <= 0.08 and two for w <= 0.002.
Shares are computed from losses, (α − α_i)/(α_(i+1) − α_i) = (e^(L − ih) − 1)/(e^h − 1), so rounding moves
mass between neighbours by at most 4 ulp · |L|/h · (2 + log(1/q) + 1/σ²) of it (the last factor is the pair's
``conditioning``: how many ulp the loss itself errs by); every U_i is raised by four times that, and by 1e-12 for
the quadrature (whose error is far below that where the mass lies; see tests/privacy/test_discretise.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from common.privacy.pairs import Array, Pair

ULP: Final = 2.0**-53
_TWO, _FOUR = np.polynomial.legendre.leggauss(2), np.polynomial.legendre.leggauss(4)
_NARROW, _FINE = 0.002, 0.08  # widest piece for two nodes, and for four (masses: certified)
_QUADRATURE: Final = 1e-12
_COARSE = 0.25  # widest piece for moments (used to choose a grid only)

# Orders at which log E_P[e^(λ L)] is kept for choosing grids: a geometric ladder with ratio sqrt(2).
LADDER: Final[Array] = 2.0 ** (np.arange(-16, 33) / 2)


@dataclass(frozen=True, slots=True)
class LossGrid:
    """Q-masses on the losses ``(low + i) * spacing``, and the probability counted as infinite loss.

    Attributes:
        spacing: h > 0, in nats.
        low: index of the lowest loss.
        mass: U_i >= 0, shape [cells + 1].
        infinite_remove: P-mass counted as infinite loss in direction P‖Q.
        infinite_add: Q-mass counted as infinite loss in direction Q‖P.
        moved: bound on the probability added or counted twice, either direction (for the lower side).
    """

    spacing: float
    low: int
    mass: Array
    infinite_remove: float
    infinite_add: float
    moved: float

    @property
    def nbytes(self) -> int:
        """Return the memory held by the masses."""
        return int(self.mass.nbytes)


def discretise(pair: Pair, spacing: float, *, cap: int, width: float) -> LossGrid:
    """Return the connect-the-dots grid of ``pair``.

    Args:
        pair: the dominating pair of one step.
        spacing: grid spacing h in nats.
        cap: no grid value beyond ``cap * spacing``, on either side.
        width: how many standard deviations of the noise are resolved; mass beyond is at most Φ(−width).
    """
    left, right = pair.reach(width)
    lowest, highest = pair.loss(np.array([left, right])) / spacing
    low = max(int(np.floor(lowest)), -cap)
    high = max(min(int(np.ceil(highest)), cap), low + 1)
    index = np.arange(low, high + 1)
    losses: Array = np.asarray(index * spacing, dtype=np.float64)
    edges = np.clip(pair.quantile(losses), left, right)
    mass = _hat_masses(pair, edges, losses, spacing)
    q_below, q_above, p_above = pair.tails(float(edges[0]), float(edges[-1]))
    mass[:2] += q_below
    mass[-1] += q_above
    mass *= 1 + _QUADRATURE + 16 * ULP * (1 + np.abs(index) * pair.conditioning)
    moved = 2 * (p_above + q_above) + 3 * q_below * max(1.0, float(np.exp((low + 1) * spacing)))
    return LossGrid(spacing, low, mass, p_above * (1 + _QUADRATURE), q_below * (1 + _QUADRATURE), moved)


def _hat_masses(pair: Pair, edges: Array, losses: Array, spacing: float) -> Array:
    """Integrate each cell's Q-mass onto its two grid values; shape [len(edges)]."""
    cuts = _pieces(edges, _FINE)
    half = np.diff(cuts) / 2
    middle = cuts[:-1] + half
    cell = np.searchsorted(edges, middle) - 1
    cells = len(edges) - 1
    mass = np.zeros(cells + 1)
    narrow = half <= _NARROW / 2
    for chosen, (nodes, weights) in ((narrow, _TWO), (~narrow, _FOUR)):
        if not chosen.any():
            continue
        into, width = cell[chosen], half[chosen]
        z = middle[chosen] + nodes[:, None] * width
        weight, loss = pair.density(z) * (weights[:, None] * width), pair.loss(z)
        to_upper = (weight * np.clip(np.expm1(loss - losses[into]), 0, None)).sum(axis=0)
        to_lower = (weight * np.clip(-np.expm1(loss - losses[into + 1]), 0, None)).sum(axis=0)
        mass[:-1] += np.bincount(into, to_lower, cells) * np.exp(spacing)
        mass[1:] += np.bincount(into, to_upper, cells)
    return np.asarray(mass / np.expm1(spacing))


def _pieces(edges: Array, widest: float) -> Array:
    """Return ``edges`` with uniform cuts merged in, so that no piece is wider than ``widest``."""
    first, last = edges[0], edges[-1]
    uniform = np.linspace(first, last, max(2, int(np.ceil((last - first) / widest)) + 1))
    return np.asarray(np.unique(np.concatenate([edges, uniform])))


def log_moments(pair: Pair, width: float) -> tuple[Array, Array]:
    """Return log E[e^(λ L)] on :data:`LADDER` in both directions, to choose grids by (not certified).

    Returns:
        Two arrays of shape [len(LADDER)]: direction P‖Q, then direction Q‖P.
    """
    cuts = _pieces(np.asarray(pair.reach(width)), _COARSE)
    half = np.diff(cuts) / 2
    z = ((cuts[:-1] + half)[:, None] + half[:, None] * _FOUR[0]).ravel()
    log_q, loss = pair.log_density(z) + np.log(half[:, None] * _FOUR[1]).ravel(), pair.loss(z)
    remove = log_sum_exp(log_q + (LADDER[:, None] + 1) * loss)
    return remove, log_sum_exp(log_q - LADDER[:, None] * loss)


def log_sum_exp(exponents: Array) -> Array:
    """Return log Σ e^exponents over the last axis, without overflow."""
    highest = exponents.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(exponents - highest).sum(axis=-1)) + highest[..., 0])
