import math

import mpmath
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant as GoogleRDP
from hypothesis import given
from hypothesis import strategies as st

from common.privacy import RDPAccountant, SampledGaussian, gdp_delta, gdp_epsilon, gdp_mu
from common.privacy.gdp import composed_mu, log_gdp_delta
from common.privacy.rdp import DEFAULT_ORDERS, rdp

mpmath.mp.dps = 25


def test_the_stored_rdp_vectors(vector, vector_events):
    expect = vector["expect"]
    for key in ("eps_rdp_default_orders", "eps_rdp"):
        if key in expect:
            found = RDPAccountant().compose_all(vector_events(vector)).epsilon(vector["delta"])
            assert found <= expect[key] * (1 + 1e-6)  # more orders can only help
            assert found >= expect[key] * 0.99


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.01), (1.0, 0.2), (3.0, 0.5), (1.0, 1e-4), (2.0, 1.0)])
def test_divergences_agree_with_the_peer_at_whole_orders(sigma, q):
    peer = GoogleRDP()
    peer.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), 7))
    orders = np.array(peer._orders)  # its figures per order have no public name
    whole = orders == np.floor(orders)  # its series for fractional orders does not always converge
    ours = RDPAccountant(orders=orders.tolist()).compose(SampledGaussian(sigma, q, 7)).divergences()
    assert ours[whole] == pytest.approx(peer._rdp[whole], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize("order", [1.1, 2.0, 3.7, 12.0])
def test_divergences_against_many_digit_integrals_and_never_below(relation, order):
    sigma, q = mpmath.mpf("0.9"), mpmath.mpf("0.15")

    def p(z):
        return (1 - q) * mpmath.npdf(z) + q * mpmath.npdf(z, 1 / sigma)

    def lower(z):
        return (
            (1 - q) * mpmath.npdf(z) + q * mpmath.npdf(z, -1 / sigma) if relation == "replace_one" else mpmath.npdf(z)
        )

    edges = [-20, -8, -3, 0, 3, 8, 16, 26, 40]
    moment = mpmath.quad(lambda z: p(z) ** order * lower(z) ** (1 - order), edges)
    exact = float(mpmath.log(moment) / (mpmath.mpf(order) - 1))
    found = float(rdp(0.9, 0.15, (order,), relation)[0])
    assert exact * (1 - 1e-14) <= found <= exact * (1 + 1e-9) + 1e-13


def test_unsampled_divergences_are_linear_in_the_order():
    orders = np.array([1.5, 2.0, 30.0])
    assert rdp(3.0, 1.0, tuple(orders), "add_remove") == pytest.approx(orders / 18, rel=1e-9)
    assert rdp(3.0, 1.0, tuple(orders), "replace_one") == pytest.approx(orders * 4 / 18, rel=1e-9)


def test_orders_without_a_bound_are_left_out_under_replace_one():
    found = rdp(1.0, 0.1, (2.0, 1024.0), "replace_one")
    assert math.isfinite(found[0])
    assert math.isinf(found[1])


@pytest.mark.parametrize("orders", [(), (1.0,), (0.5, 2.0), (math.inf,), (math.nan,)])
def test_bad_orders_are_refused(orders):
    with pytest.raises(ValueError, match="orders must be"):
        RDPAccountant(orders=orders)


def test_rdp_says_zero_where_the_total_variation_is_below_delta():
    assert RDPAccountant().compose(SampledGaussian(100.0, 1e-6)).epsilon(1e-3) == 0.0


def test_the_orders_reach_what_small_epsilons_need():
    assert max(DEFAULT_ORDERS) >= 1024
    assert min(DEFAULT_ORDERS) <= 1.1


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 0.0), (1.0, 2.0), (0.1, 0.5), (5.0, 20.0), (0.3, 2.4)])
def test_gaussian_delta_against_many_digits(mu, epsilon):
    m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
    exact = mpmath.ncdf(m / 2 - e / m) - mpmath.e**e * mpmath.ncdf(-m / 2 - e / m)
    assert exact * (1 - mpmath.mpf(10) ** -15) <= gdp_delta(mu, epsilon) <= exact * (1 + mpmath.mpf(10) ** -10)


@given(st.floats(0.01, 20), st.sampled_from([1e-12, 1e-6, 1e-2]))
def test_gaussian_epsilon_and_mu_invert_delta(mu, delta):
    epsilon = gdp_epsilon(mu, delta)
    assert gdp_delta(mu, epsilon) <= delta * (1 + 1e-9)
    if epsilon > 0:
        assert gdp_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)
        assert gdp_epsilon(gdp_mu(epsilon, delta), delta) <= epsilon * (1 + 1e-11)


def test_the_stored_gdp_budgets(gdp_vector):
    assert gdp_mu(gdp_vector["eps"], gdp_vector["delta"]) == pytest.approx(gdp_vector["expect"]["mu_budget"], rel=1e-6)


def test_a_vanishing_delta_is_minus_infinity_not_an_error():
    assert log_gdp_delta(1e-9, 1.0) == -math.inf


def test_sampled_events_have_no_mu():
    with pytest.raises(ValueError, match="sample_rate must be 1"):
        composed_mu([SampledGaussian(1.0, 0.5)])
    assert composed_mu([SampledGaussian(2.0, 1.0, 4), SampledGaussian(1.0)]) == pytest.approx(math.sqrt(2))


def test_a_weak_gaussian_costs_nothing_at_a_large_delta():
    assert gdp_epsilon(1e-3, 0.1) == 0.0
