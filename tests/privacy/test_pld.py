import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting import NeighboringRelation as Neighbours
from dp_accounting.pld import PLDAccountant as GooglePLD
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy import PLDAccountant, RDPAccountant, SampledGaussian, TooLarge, gdp_delta, gdp_epsilon
from common.privacy import composition as composition_module


def peer(event, delta, *, spacing=1e-4, relation=Neighbours.ADD_OR_REMOVE_ONE):
    accountant = GooglePLD(relation, value_discretization_interval=spacing)
    step = PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, event.steps))
    return accountant.get_epsilon(delta)


def test_the_stored_vectors(vector, vector_events):
    held = PLDAccountant(vector.get("relation", "add_remove")).compose_all(vector_events(vector))
    found, expect = held.epsilon(vector["delta"]), vector["expect"]
    if "eps_exact" in expect:
        assert expect["eps_exact"] <= found <= expect["eps_exact"] * (1 + 1e-6)
    if "eps_pld_pess_h1e-4" in expect:
        assert found <= expect["eps_pld_pess_h1e-4"] * 1.001
        assert found >= expect["eps_pld_pess_h1e-4"] * (1 - 1e-3)
    if "eps_pld_pess_h1e-3" in expect:
        assert found == pytest.approx(expect["eps_pld_pess_h1e-3"], rel=vector["tol_rel"])
    if "eps_prv_eps_error_0.01" in expect:
        assert found >= expect["eps_prv_eps_error_0.01"][0]
        assert held.epsilon_lower(vector["delta"]) <= expect["eps_prv_eps_error_0.01"][2]
    if "eps_pld_opt_h1e-4" in expect:
        assert found >= expect["eps_pld_opt_h1e-4"]
    if "delta_at_eps1" in expect:
        assert held.delta(1.0) == pytest.approx(expect["delta_at_eps1"], rel=1e-3)


def test_the_lower_side_is_near_and_below(vector, vector_events):
    held = PLDAccountant(vector.get("relation", "add_remove")).compose_all(vector_events(vector)[:5])
    low, high = held.epsilon_lower(vector["delta"]), held.epsilon(vector["delta"])
    assert low <= high
    assert low >= high * 0.99


# Twelve of the settings of benchmarks/accountant.py "random", kept small; the benchmark runs two hundred.
@pytest.mark.parametrize("seed", range(12))
def test_never_above_a_thousandth_over_the_peer(seed):
    rng = np.random.default_rng(1000 + seed)
    while True:
        q, sigma = float(np.exp(rng.uniform(np.log(1e-4), 0))), float(np.exp(rng.uniform(np.log(0.8), np.log(10))))
        steps, delta = int(np.exp(rng.uniform(0, np.log(1e4)))), float(10 ** rng.uniform(-8, -4))
        event = SampledGaussian(sigma, q, steps)
        if 0.1 <= RDPAccountant().compose(event).epsilon(delta) <= 20:
            break
    ours = PLDAccountant().compose(event)
    theirs = peer(event, delta)
    assert ours.epsilon(delta) <= theirs * 1.001
    # dp-accounting's figure is an upper bound as well: our lower side must not exceed it.
    assert ours.epsilon_lower(delta) <= theirs


def test_replace_one_agrees_with_the_peer():
    event = SampledGaussian(0.9, 0.03, 150)
    found = PLDAccountant("replace_one").compose(event).epsilon(1e-6)
    theirs = peer(event, 1e-6, relation=Neighbours.REPLACE_ONE)
    assert found == pytest.approx(theirs, rel=1e-3)
    assert PLDAccountant("replace_one").compose(event).epsilon_lower(1e-6) <= theirs


def test_replace_one_without_sampling_has_twice_the_sensitivity():
    event = SampledGaussian(4.0, 1.0, 9)
    assert PLDAccountant("replace_one").compose(event).epsilon(1e-5) == pytest.approx(gdp_epsilon(1.5, 1e-5), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 50), st.integers(1, 1000), st.sampled_from([1e-12, 1e-10, 1e-5, 1e-2]))
def test_unsampled_gaussians_are_exact(sigma, steps, delta):
    found = PLDAccountant().compose(SampledGaussian(sigma, 1.0, steps)).epsilon(delta)
    exact = gdp_epsilon(math.sqrt(steps) / sigma, delta)
    assert exact * (1 - 1e-11) <= found <= exact * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("mu", [0.05, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-8, 1e-4])
def test_the_grid_itself_is_within_a_thousandth_of_an_exact_gaussian(mu, delta):
    """A rate just below 1 takes the numerical path; its cost is that of the closed form to 1e-9."""
    event = SampledGaussian(10 / mu, 1 - 1e-12, 100)
    found, exact = PLDAccountant().compose(event).epsilon(delta), gdp_epsilon(mu, delta)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-3)
    assert PLDAccountant().compose(event).delta(exact) >= delta * (1 - 1e-6)
    assert PLDAccountant().compose(event).epsilon_lower(delta) <= exact


@pytest.mark.parametrize("delta", [1e-10, 1e-12, 1e-15])
def test_small_deltas_are_answered_tightly(delta):
    event = SampledGaussian(1.0, 0.01, 1000)
    held = PLDAccountant().compose(event)
    assert held.epsilon(delta) <= RDPAccountant().compose(event).epsilon(delta)
    assert held.epsilon_lower(delta) >= held.epsilon(delta) * 0.99


def test_small_epsilons_get_a_finer_grid():
    # sigma 0.725, q 1.3e-4, 16 steps, delta 8.5e-6: the Rényi bound is 0.96, the truth below 0.0076
    held = PLDAccountant().compose(SampledGaussian(0.725, 0.00013, 16))
    assert held.epsilon_lower(8.5e-6) >= 0.0071
    assert held.epsilon(8.5e-6) <= 0.0076


def test_a_delta_above_the_total_variation_costs_nothing():
    assert PLDAccountant().compose(SampledGaussian(2.0, 1e-4, 1)).epsilon(1e-3) == 0.0


def test_epsilon_beyond_the_window_of_delta():
    held = PLDAccountant().compose(SampledGaussian(1.0, 0.01, 1000))
    assert held.delta(200.0) < 1e-15


def test_strong_steps_and_endless_lists_are_refused_not_guessed():
    with pytest.raises(TooLarge, match="noise_multiplier must be at least"):
        PLDAccountant().compose(SampledGaussian(0.01, 0.5)).epsilon(1e-5)
    with pytest.raises(TooLarge, match="steps must be at most"):
        PLDAccountant().compose(SampledGaussian(1.0, 0.5, 10**10))
    with pytest.raises(TooLarge, match="must amount to μ of at most"):
        PLDAccountant().compose(SampledGaussian(1.0, 1.0, 10**4), SampledGaussian(1.0, 0.5)).epsilon(1e-5)
    with pytest.raises(TooLarge, match="refused rather than approximated"):
        PLDAccountant().compose(SampledGaussian(0.3, 0.999, 10**9)).epsilon(1e-5)


def test_mixed_sampled_and_unsampled_steps_agree_with_the_peer():
    accountant = GooglePLD(value_discretization_interval=1e-4)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.1)), 200))
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(15.0), 30))
    held = PLDAccountant().compose(SampledGaussian(1.1, 0.02, 200), SampledGaussian(15.0, 1.0, 30))
    assert held.epsilon(1e-6) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-3)


def test_many_distinct_rounds_asked_one_by_one_equal_the_list_asked_at_once():
    rng = np.random.default_rng(3)
    sigmas, rates = rng.uniform(0.8, 1.5, 40), rng.uniform(0.005, 0.02, 40)
    listed = [SampledGaussian(float(sigma), float(q)) for sigma, q in zip(sigmas, rates, strict=True)]
    step_by_step = PLDAccountant()
    for event in listed:
        step_by_step = step_by_step.compose(event)
        step_by_step.epsilon(1e-5)
    composition_module.clear_caches()
    at_once = PLDAccountant().compose_all(reversed(listed)).epsilon(1e-5)
    assert step_by_step.epsilon(1e-5) == pytest.approx(at_once, rel=1e-9)


def test_the_lower_side_of_nothing_and_of_almost_nothing_is_zero():
    assert PLDAccountant().epsilon_lower(1e-5) == 0.0
    assert PLDAccountant().compose(SampledGaussian(2.0, 1e-4, 1)).epsilon_lower(1e-3) == 0.0


def test_the_lower_side_of_gaussians_is_their_closed_form():
    held = PLDAccountant().compose(SampledGaussian(2.0, 1.0, 4))
    assert held.epsilon_lower(1e-5) == pytest.approx(gdp_epsilon(1.0, 1e-5), rel=1e-8)
    assert held.delta(1.0) == pytest.approx(gdp_delta(1.0, 1.0), rel=1e-9)
