"""The grid of one step against high-precision integrals, and composition against exact convolution."""

import math
from functools import partial
from itertools import product

import mpmath
import numpy as np
import pytest

from common.privacy.composition import Product
from common.privacy.discretise import discretise, log_moments
from common.privacy.grids import Grid, Window
from common.privacy.pairs import AddRemovePair, ReplaceOnePair, dominating_pair
from common.privacy.profile import Profile
from common.privacy.spectrum import Store, power, transform

mpmath.mp.dps = 30
PAIRS = [AddRemovePair(1.0, 0.01), AddRemovePair(0.5, 0.3), AddRemovePair(2.0, 1.0), ReplaceOnePair(1.0, 0.05)]


def exact_delta(pair, epsilon, *, flipped):
    """H_(e^ε) of the pair in 30 digits, P(S) − e^ε Q(S) with S where the loss exceeds ε; or with P and Q exchanged.

    S is a half line whose end is taken from the pair in double precision: H is stationary there.
    """
    sigma, q = mpmath.mpf(pair.noise_multiplier), mpmath.mpf(pair.sample_rate)
    end = float(pair.quantile(np.array([-epsilon if flipped else epsilon]))[0])
    if not math.isfinite(end):
        return mpmath.mpf(0)
    side = 1 if flipped else -1  # Φ(side · z): below the end, or above it

    def mixture(mean):
        return (1 - q) * mpmath.ncdf(side * mpmath.mpf(end)) + q * mpmath.ncdf(side * (end - mean))

    p, lower = mixture(1 / sigma), mixture(-1 / sigma) if pair.symmetric else mixture(0)
    first, second = (lower, p) if flipped else (p, lower)
    return first - mpmath.e ** mpmath.mpf(epsilon) * second


def grid_delta(losses, epsilon, *, flipped):
    index = losses.low + np.arange(len(losses.mass))
    loss = index * losses.spacing
    first, second = losses.mass * np.exp(loss), losses.mass
    if flipped:
        first, second = second, first
    infinite = losses.infinite_add if flipped else losses.infinite_remove
    return infinite + float(np.maximum(first - math.exp(epsilon) * second, 0).sum())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_the_grid_dominates_the_true_pair_and_touches_it_at_grid_losses(pair, flipped):
    losses = discretise(pair, 2.0**-6, cap=2000, width=9.0)
    for epsilon in (0.0, 2.0**-6, 0.109375, 0.5, 1.0):  # multiples of the spacing: connect the dots is exact there
        true, found = exact_delta(pair, epsilon, flipped=flipped), grid_delta(losses, epsilon, flipped=flipped)
        assert found >= true * (1 - 1e-15)
        assert found <= true * (1 + mpmath.mpf(10) ** -9) + mpmath.mpf(10) ** -17
    for epsilon in (0.003, 0.12, 0.77):  # between them it lies above, on the chord in e^ε
        true, found = exact_delta(pair, epsilon, flipped=flipped), grid_delta(losses, epsilon, flipped=flipped)
        below = math.floor(epsilon * 64) / 64
        ends = [exact_delta(pair, x, flipped=flipped) for x in (below, below + 2.0**-6)]
        share = math.expm1(epsilon - below) / math.expm1(2.0**-6)
        assert true * (1 - 1e-15) <= found <= ((1 - share) * ends[0] + share * ends[1]) * (1 + 1e-9) + 1e-17


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_both_masses_of_the_grid_add_up_to_one(pair):
    losses = discretise(pair, 2.0**-8, cap=8000, width=9.0)
    index = losses.low + np.arange(len(losses.mass))
    assert losses.mass.sum() == pytest.approx(1, abs=1e-9)
    assert (losses.mass * np.exp(index * losses.spacing)).sum() == pytest.approx(1, abs=1e-9)
    assert np.all(losses.mass >= 0)


def test_losses_beyond_the_cap_count_as_infinite():
    pair = AddRemovePair(1.0, 0.5)
    losses = discretise(pair, 2.0**-4, cap=16, width=9.0)  # nothing beyond a loss of 1
    for flipped, epsilon in product((False, True), (0.0, 0.25, 0.5)):
        assert grid_delta(losses, epsilon, flipped=flipped) >= exact_delta(pair, epsilon, flipped=flipped)
    assert losses.infinite_remove > 0.05


def test_one_cell_is_right_to_twelve_digits():
    """A cell's two masses against 30-digit integrals: the quadrature witness that the docstring names."""
    pair, h = AddRemovePair(0.8, 0.02), 2.0**-9
    losses = discretise(pair, h, cap=4000, width=9.0)
    q, sigma = mpmath.mpf(pair.sample_rate), mpmath.mpf(pair.noise_multiplier)
    for i in (-5, 0, 1, 40, 700):
        edges = [float(x) for x in pair.quantile(np.array([(i - 1) * h, i * h, (i + 1) * h]))]

        below, at, above = (mpmath.e ** ((i + k) * mpmath.mpf(h)) for k in (-1, 0, 1))

        def share(z, start=None, end=None):
            ratio = 1 - q + q * mpmath.e ** (z / sigma - 1 / (2 * sigma**2))
            return mpmath.npdf(z) * (ratio - start) / (end - start)

        rise = mpmath.quad(partial(share, start=below, end=at), np.linspace(*edges[:2], 5).tolist())
        fall = mpmath.quad(partial(share, start=above, end=at), np.linspace(*edges[1:], 5).tolist())
        assert losses.mass[i - losses.low] == pytest.approx(float(rise + fall), rel=2e-11)
        assert losses.mass[i - losses.low] >= float(rise + fall)


def test_moments_of_an_unsampled_gaussian_are_quadratic():
    remove, add = log_moments(dominating_pair(2.0, 1.0, "add_remove"), 12.0)
    from common.privacy.discretise import LADDER

    known = LADDER <= 8
    expected = LADDER[known] * (LADDER[known] + 1) / 8
    assert remove[known] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert add[known] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_composition_in_the_frequency_domain_bounds_exact_convolution(steps):
    """δ(ε) from spectra against a plain convolution of the grid's own masses, in extended precision."""
    pair, h = AddRemovePair(1.0, 0.2), 2.0**-5
    grid = Grid(h, 4096, 600, (4.0, 8.0), 8.0, 9.0)
    losses = discretise(pair, h, cap=grid.cap, width=grid.width)
    spectrum = transform(losses, grid, 2)
    start = Product(np.ones_like(spectrum.values), np.zeros(2), np.zeros(2), np.zeros(2), 0.0, 0.0, 0)
    profile = Profile(start.times(spectrum, steps), Window(grid, steps))
    index = losses.low + np.arange(len(losses.mass))
    remove = (losses.mass * np.exp(index * h)).astype(np.longdouble)
    add = losses.mass[::-1].astype(np.longdouble)
    for epsilon in (0.3, 1.0, 2.0):
        found = profile.delta(epsilon)
        exact = 0.0
        for masses, low, infinite in (
            (remove, losses.low, losses.infinite_remove),
            (add, -index[-1], losses.infinite_add),
        ):
            total = np.array([1.0], dtype=np.longdouble)
            for _ in range(steps):
                total = np.convolve(total, masses)
            loss = (low * steps + np.arange(len(total))) * h
            exact = max(exact, float(np.maximum(total * -np.expm1(epsilon - loss), 0).sum()) + steps * infinite)
        assert exact <= found <= exact * (1 + 1e-5)


@pytest.mark.parametrize("exponent", [1, 2, 3, 10, 1000, 12345])
def test_powers_by_squaring(exponent):
    values = np.exp(1j * np.linspace(0, 3, 7)) * np.linspace(0.5, 1, 7)
    exact = np.array([complex(mpmath.mpc(v.real, v.imag) ** exponent) for v in values])
    assert np.abs(power(values, exponent) - exact).max() <= 2.3 * exponent * 2.0**-53 * 1.5


class Block:
    nbytes = 100


def test_the_store_forgets_what_was_used_longest_ago():
    store, made = Store(250), []

    def make(name):
        return store.get(name, lambda: made.append(name) or Block())

    for name in ("a", "b", "a", "c", "a", "b"):
        make(name)
    assert made == ["a", "b", "c", "b"]
