import math

import numpy as np
import pytest
from scipy.stats import norm

from common.privacy import PLDAccountant, SampledGaussian, gdp_epsilon
from common.privacy.calibrate import calibrate_steps
from common.privacy.filters import EnvelopeFilter, FilterExhausted, GDPFilter, RenyiFilter, best_order
from common.privacy.pairs import AddRemovePair
from common.privacy.validity import Contradiction, Plan, cross_checked


def branch_delta(epsilons, q, sigma):
    """δ(ε) of one step, first distribution N(0) + a sampled shift, for every real ε; the closed form."""
    pair = AddRemovePair(sigma, q)
    z = pair.quantile(np.asarray(epsilons))
    above_p = (1 - q) * norm.sf(z) + q * norm.sf(z - 1 / sigma)
    return above_p - np.exp(epsilons) * norm.sf(z)


BRANCHES = {"one": (0.1, 0.891), "two": (1.0, 3.053), "three": (0.01, 0.435)}


@pytest.mark.parametrize(
    ("chosen", "reached"), [(("one", "two"), 1.409e-3), (("two", "three"), 1.536e-3), (("one", "three"), 1.138e-3)]
)
def test_path_wise_composition_is_refuted_by_two_rounds(chosen, reached):
    """Round 1 is (q .1, σ 1). After its output x the analyst picks the branch that is worse at ε − L(x)."""
    x = np.linspace(-12, 13, 200_001)
    first = AddRemovePair(1.0, 0.1)
    density = 0.9 * norm.pdf(x) + 0.1 * norm.pdf(x - 1)
    left = 1.0 - first.loss(x)
    options = [branch_delta(left, *BRANCHES[name]) for name in chosen]
    adaptive = float(np.trapezoid(density * np.maximum(*options), x))
    assert adaptive == pytest.approx(reached, rel=3e-3)
    for name, option in zip(chosen, options, strict=True):
        q, sigma = BRANCHES[name]
        path = Plan((SampledGaussian(1.0, 0.1), SampledGaussian(sigma, q)), "adaptive")
        composed = PLDAccountant().compose_all(path.events).delta(1.0)
        assert composed == pytest.approx(1.0e-3, rel=4e-3)  # what path-wise PLD would claim
        assert composed == pytest.approx(float(np.trapezoid(density * option, x)), rel=1e-3)
        assert adaptive > 1.1 * composed
        with pytest.raises(ValueError, match="'adaptive'"):
            path.accountant()


def test_a_renyi_filter_covers_the_refutation():
    """At every order, the δ(1) that a filter promises for what it admits is above the δ the analyst reaches."""
    first = SampledGaussian(1.0, 0.1)
    for order in (2.0, 4.0, 6.2, 10.0, 20.0):
        held = RenyiFilter(order, 40.0, 1e-5)
        used = max(held.divergence([first, SampledGaussian(sigma, q)]) for q, sigma in BRANCHES.values())
        log_promised = (order - 1) * (used - 1.0 + math.log1p(-1 / order)) - math.log(order)
        assert log_promised >= math.log(1.536e-3)


def test_stored_round_counts(rounds_vector):
    epsilon, delta, q, sigma = (rounds_vector[k] for k in ("eps", "delta", "q", "sigma"))
    event, expect = SampledGaussian(sigma, q), rounds_vector["expect"]
    order = best_order([event], target_epsilon=epsilon, target_delta=delta)
    by_filter = RenyiFilter(order, epsilon, delta).rounds_of(event)
    assert by_filter == pytest.approx(expect["rounds_renyi_filter_fixed_alpha"], rel=rounds_vector["tol_rel"])
    by_pld = calibrate_steps(target_epsilon=epsilon, target_delta=delta, noise_multiplier=sigma, sample_rate=q)
    stored = expect["rounds_pld_fixed_schedule_h1e-3"]  # taken on a coarser grid: it may be 1 % too small
    assert stored * 0.999 <= by_pld <= stored * 1.01
    assert by_pld >= by_filter


def test_a_filter_admits_exactly_as_many_rounds_as_it_says():
    event = SampledGaussian(2.0, 0.1, 10)
    order = best_order([event], target_epsilon=2.0, target_delta=1e-5)
    held = RenyiFilter(order, 2.0, 1e-5)
    promised, admitted = held.rounds_of(event), 0
    while held.fits(event):
        held, admitted = held.spend(event), admitted + 1
    assert abs(admitted - promised) <= 1
    with pytest.raises(FilterExhausted, match="does not fit"):
        held.spend(event)
    assert len(held.spent) == admitted


def test_a_gdp_filter_loses_nothing_against_the_closed_form():
    held = GDPFilter(8.0, 1e-5)
    event = SampledGaussian(10.0)
    while held.fits(event):
        held = held.spend(event)
    assert len(held.spent) == 277
    assert gdp_epsilon(math.sqrt(277) / 10, 1e-5) <= 8.0 < gdp_epsilon(math.sqrt(278) / 10, 1e-5)
    with pytest.raises(FilterExhausted):
        held.spend(event)
    with pytest.raises(ValueError, match="sample_rate must be 1"):
        held.fits(SampledGaussian(10.0, 0.5))


def test_a_gdp_filter_under_replace_one_admits_a_quarter():
    one, other = GDPFilter(8.0, 1e-5), GDPFilter(8.0, 1e-5, relation="replace_one")
    for held, rounds in ((one, 277), (other, 69)):
        assert held.fits(SampledGaussian(10.0, 1.0, rounds))
        assert not held.fits(SampledGaussian(10.0, 1.0, rounds + 1))


def test_an_order_that_leaves_no_budget_is_refused():
    with pytest.raises(ValueError, match="leaves no room"):
        RenyiFilter(1.5, 1.0, 1e-5)
    with pytest.raises(ValueError, match="order must be"):
        RenyiFilter(1.0, 1.0, 1e-5)
    with pytest.raises(ValueError, match="no order leaves room"):
        best_order([SampledGaussian(1.0)], target_epsilon=1e-6, target_delta=1e-15)


def test_an_envelope_admits_what_lies_below_its_worst_case_and_charges_the_worst_case():
    worst = (SampledGaussian(1.0, 0.1, 5), SampledGaussian(0.8, 0.2, 2))
    held = EnvelopeFilter(worst)
    held = held.spend(SampledGaussian(1.5, 0.05, 4))
    for outside in (SampledGaussian(0.79, 0.2, 2), SampledGaussian(0.8, 0.21, 2), SampledGaussian(0.8, 0.2, 3)):
        assert not held.fits(outside)
    held = held.spend(SampledGaussian(0.8, 0.2, 2))
    assert not held.fits(SampledGaussian(99.0, 1e-9, 1))  # all rounds are used
    assert held.epsilon(1e-5) == PLDAccountant().compose_all(worst).epsilon(1e-5)
    assert held.epsilon(1e-5) >= PLDAccountant().compose_all(held.spent).epsilon(1e-5)
    with pytest.raises(FilterExhausted):
        held.spend(SampledGaussian(1.0, 0.1, 1))


def test_a_plan_says_which_accountant_is_valid():
    sampled, full = (SampledGaussian(1.0, 0.1),), (SampledGaussian(1.0),)
    assert Plan(sampled).valid_accountants() == ("pld", "rdp")
    assert Plan(full).valid_accountants() == ("gdp", "pld", "rdp")
    assert Plan(sampled, "envelope").valid_accountants() == ("pld", "rdp")
    assert Plan(sampled, "adaptive").valid_accountants() == ("renyi_filter",)
    assert Plan(full, "adaptive").valid_accountants() == ("gdp_filter", "renyi_filter")
    assert isinstance(Plan(full, "adaptive").filter(2.0, 1e-5), GDPFilter)
    assert isinstance(Plan(sampled, "adaptive").filter(2.0, 1e-5), RenyiFilter)
    assert Plan(sampled, "envelope").accountant().epsilon(1e-5) > 0
    with pytest.raises(ValueError, match="choice must be one of"):
        Plan(sampled, "whatever")


def test_upper_bounds_are_confronted_with_the_lower_side(monkeypatch):
    plan = Plan((SampledGaussian(1.0, 0.05, 100),))
    found = cross_checked(plan, 1e-5)
    assert found.epsilon_lower <= found.epsilon <= found.epsilon_rdp
    monkeypatch.setattr("common.privacy.rdp.rdp_epsilon", lambda *_: found.epsilon_lower * 0.99)
    with pytest.raises(Contradiction, match="no number of this plan may be used"):
        cross_checked(plan, 1e-5)
