"""Allocation of noise over groups, and what adaptive clipping costs: against direct computations of the sensitivity."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from common.privacy import gdp_epsilon
from common.privacy.allocation import (
    cheapest_noise_stds,
    group_noise_multiplier,
    scaled_noise_multiplier,
    weighted_noise_multiplier,
)
from common.privacy.clipping import charged_noise_multiplier, sum_noise_multiplier

positives = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(positives)
def test_equal_noise_in_units_of_the_clip_adds_up_like_independent_releases(clips):
    stds = [3 * clip for clip in clips]
    assert group_noise_multiplier(clips, stds) == pytest.approx(3 / math.sqrt(len(clips)), rel=1e-12)


def test_one_group_is_an_ordinary_gaussian():
    assert group_noise_multiplier([0.5], [1.5]) == pytest.approx(3.0, rel=1e-12)
    assert group_noise_multiplier([0.5], [1.5]) <= 3.0


@given(st.floats(0.3, 5), positives, st.integers(0, 2**31))
def test_the_cheapest_split_keeps_the_multiplier_and_beats_others(sigma, clips, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1000, len(clips))
    stds = cheapest_noise_stds(sigma, clips, sizes)
    assert group_noise_multiplier(clips, stds) == pytest.approx(sigma, rel=1e-9)
    cost = float(np.sum(sizes * stds**2))
    for _ in range(5):
        other = np.asarray(clips) * np.exp(rng.normal(size=len(clips)))
        other = other * sigma / group_noise_multiplier(clips, other)
        assert float(np.sum(sizes * other**2)) >= cost * (1 - 1e-9)


def test_the_cheapest_split_against_a_numerical_optimum():
    clips, sizes, weights, sigma = np.array([0.2, 1.0, 0.7]), np.array([900, 900, 50]), np.array([1.0, 2.0, 5.0]), 1.3

    def cost(log_share):
        share = np.exp(log_share) / np.exp(log_share).sum()  # of 1/sigma²
        return float(np.sum(weights * sizes * sigma**2 * clips**2 / share))

    best = minimize(
        cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-10, "maxiter": 4000}
    ).fun
    stds = cheapest_noise_stds(sigma, clips, sizes, weights)
    assert float(np.sum(weights * sizes * stds**2)) == pytest.approx(best, rel=1e-6)


def test_two_factors_of_equal_size_save_31_percent():
    clips, size = [0.2, 1.0], 6144.6
    flat = math.sqrt(0.2**2 + 1.0**2)
    stds = cheapest_noise_stds(1.0, clips, [1, 1])
    saved = 1 - float(np.sum(size * stds**2)) / (2 * size * flat**2)
    assert saved == pytest.approx(1 - 8847 / 12780, abs=1e-3)


@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=6), st.integers(0, 2**31))
def test_clipping_in_the_scaled_norm_makes_the_whitened_shift_at_most_one_over_sigma(scales, seed):
    """The sensitivity in units of the noise, by trying records: |Σ^(-1/2) Δ| <= 1/σ, with equality reached."""
    rng, s, sigma, clip = np.random.default_rng(seed), np.asarray(scales), 1.7, 0.4
    charged = scaled_noise_multiplier(sigma, s, clipped_in_scaled_norm=True)
    for _ in range(20):
        g = rng.normal(size=len(s)) * 10 ** rng.uniform(-2, 2)
        g = g * min(1.0, clip / float(np.linalg.norm(g / s)))
        assert np.linalg.norm(g / (sigma * clip * s)) <= 1 / charged * (1 + 1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.integers(0, 1000))
def test_mean_preserving_weights_under_ordinary_clipping_are_charged_at_their_minimum(raw, seed):
    weights, sigma, clip = np.asarray(raw) / np.mean(raw), 1.0, 0.5
    charged = weighted_noise_multiplier(sigma, weights)
    worst = np.zeros(len(weights))
    worst[int(np.argmin(weights))] = clip  # the record that lies along the least noised coordinate
    truth = 1 / float(np.linalg.norm(worst / (sigma * clip * weights)))
    assert charged <= truth * (1 + 1e-12)
    assert charged == pytest.approx(truth, rel=1e-9)
    assert charged <= sigma


@pytest.mark.parametrize(("spread", "truly"), [(2, 6.73), (4, 11.02), (10, 23.65)])
def test_the_claimed_epsilon_of_importance_weights_is_not_theirs(spread, truly):
    """Log-uniform weights of mean 1 with max/min = spread: one Gaussian with σ = 1 claims 4.38."""
    grid = np.exp(np.linspace(0, math.log(spread), 20_001))
    weights = grid / np.trapezoid(grid, np.linspace(0, 1, len(grid)))
    assert gdp_epsilon(1.0, 1e-5) == pytest.approx(4.38, abs=0.01)
    assert gdp_epsilon(1 / weighted_noise_multiplier(1.0, weights), 1e-5) == pytest.approx(truly, rel=5e-3)


def test_ill_conditioned_scales_are_refused():
    with pytest.raises(ValueError, match="condition number"):
        scaled_noise_multiplier(1.0, [1.0, 1001.0], clipped_in_scaled_norm=True)


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [math.nan], [math.inf], [[1.0]]])
def test_bad_lists_are_named(bad):
    with pytest.raises(ValueError, match="clipping_norms must be"):
        group_noise_multiplier(bad, [1.0])
    with pytest.raises(ValueError, match="scales must be"):
        scaled_noise_multiplier(1.0, bad, clipped_in_scaled_norm=True)
    with pytest.raises(ValueError, match="same length"):
        group_noise_multiplier([1.0, 1.0], [1.0])


@given(st.floats(0.1, 5), st.floats(1.01, 50))
def test_sum_and_count_together_cost_the_charged_multiplier(z, factor):
    """The whitened shift of one record: its clipped gradient and half a count, at worst in both at once."""
    count_std = z / 2 * factor
    z_sum = sum_noise_multiplier(z, count_noise_std=count_std)
    shift = math.hypot(1 / z_sum, 0.5 / count_std)
    assert shift <= 1 / z * (1 + 1e-12)
    assert z_sum > z
    assert charged_noise_multiplier(z_sum, count_noise_std=count_std) == pytest.approx(z, rel=1e-9)


def test_bits_that_are_not_centred_cost_more_than_is_charged():
    """σ_b = 1, z_Δ from z = 1 with centred bits: with bits in {0, 1} the same noise costs 6.07 instead of 4.38."""
    z_sum = sum_noise_multiplier(1.0, count_noise_std=1.0)
    assert gdp_epsilon(math.hypot(1 / z_sum, 0.5), 1e-5) == pytest.approx(4.377, abs=1e-3)
    assert gdp_epsilon(math.hypot(1 / z_sum, 1.0), 1e-5) == pytest.approx(6.07, abs=0.01)


def test_a_count_that_alone_costs_more_than_the_step_is_refused():
    with pytest.raises(ValueError, match="count_noise_std must be above"):
        sum_noise_multiplier(1.0, count_noise_std=0.5)
