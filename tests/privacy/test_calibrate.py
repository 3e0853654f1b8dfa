import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy import PLDAccountant, RDPAccountant, SampledGaussian, calibrate_noise_multiplier
from common.privacy.calibrate import calibrate_sample_rate, calibrate_steps, largest_count_meeting, smallest_meeting

TARGET = {"target_epsilon": 3.0, "target_delta": 1e-5}


def test_the_stored_calibrations(calibration_vector):
    fixed = {"target_delta": calibration_vector["delta"], "sample_rate": calibration_vector["q"]}
    for accountant, key in ((PLDAccountant, "sigma_pld_h1e-3"), (RDPAccountant, "sigma_rdp")):
        found = calibrate_noise_multiplier(
            target_epsilon=calibration_vector["eps"], steps=calibration_vector["T"], accountant=accountant, **fixed
        )
        assert found == pytest.approx(calibration_vector["expect"][key], rel=calibration_vector["tol_rel"])


# EW-Tune's four tasks, 30 epochs, δ 1e-5: records, batch, ε, sigma by dp-accounting's PLD, by its RDP.
EW_TUNE = [
    (67_349, 2000, 8, 0.8773, 0.9180),
    (104_743, 4000, 8, 0.9404, 0.9862),
    (363_846, 12_000, 3, 1.5931, 1.6956),
    (392_702, 14_000, 3, 1.6449, 1.7520),
]


@pytest.mark.parametrize(("records", "batch", "epsilon", "by_pld", "by_rdp"), EW_TUNE)
def test_exact_accounting_saves_four_to_six_percent_of_noise(records, batch, epsilon, by_pld, by_rdp):
    q, steps = batch / records, math.ceil(30 * records / batch)
    target = {"target_epsilon": epsilon, "target_delta": 1e-5, "sample_rate": q, "steps": steps}
    ours = calibrate_noise_multiplier(**target)
    rdp = calibrate_noise_multiplier(**target, accountant=RDPAccountant)
    assert ours == pytest.approx(by_pld, rel=1e-3)
    assert rdp == pytest.approx(by_rdp, rel=2e-3)
    assert 0.042 < 1 - ours / rdp < 0.064


def test_the_three_searches_agree_with_each_other():
    sigma = calibrate_noise_multiplier(sample_rate=0.02, steps=500, **TARGET)
    assert PLDAccountant().compose(SampledGaussian(sigma, 0.02, 500)).epsilon(1e-5) <= 3.0
    less = SampledGaussian(sigma * (1 - 1e-3), 0.02, 500)
    assert PLDAccountant().compose(less).epsilon(1e-5) > 3.0
    steps = calibrate_steps(noise_multiplier=sigma, sample_rate=0.02, **TARGET)
    assert 500 <= steps <= 501
    assert calibrate_sample_rate(noise_multiplier=sigma, steps=500, **TARGET) == pytest.approx(0.02, rel=1e-3)


def test_replace_one_needs_more_noise():
    fixed = {"sample_rate": 0.05, "steps": 100, **TARGET}
    assert calibrate_noise_multiplier(relation="replace_one", **fixed) > 1.3 * calibrate_noise_multiplier(**fixed)


def test_a_target_that_full_batches_meet_gives_rate_one():
    assert calibrate_sample_rate(noise_multiplier=50.0, steps=1, **TARGET) == 1.0


def test_no_step_fits_where_one_costs_too_much():
    assert calibrate_steps(target_epsilon=0.1, target_delta=1e-9, noise_multiplier=0.5, sample_rate=1.0) == 0


def test_noise_too_small_to_compute_counts_as_infinite_cost():
    sigma = calibrate_noise_multiplier(target_epsilon=300.0, target_delta=1e-5, sample_rate=0.9, steps=1)
    assert PLDAccountant().compose(SampledGaussian(sigma, 0.9, 1)).epsilon(1e-5) <= 300.0


@pytest.mark.parametrize("field", ["target_epsilon", "target_delta", "sample_rate", "steps", "relative_tolerance"])
def test_a_bad_field_is_named(field):
    fields = {"sample_rate": 0.1, "steps": 10, **TARGET, field: -1}
    name = "tolerance" if field == "relative_tolerance" else field
    with pytest.raises(ValueError, match=name):
        calibrate_noise_multiplier(**fields)


def test_a_target_out_of_reach_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="is not met up to"):
        smallest_meeting(lambda x: 2.0, 1.0, guess=1.0, low=0.1, high=10.0)


def test_a_target_met_at_the_lower_end_gives_the_lower_end():
    assert smallest_meeting(lambda x: 0.0, 1.0, guess=1.0, low=0.1, high=10.0) == 0.1


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0.2, 5), st.floats(1e-2, 1e2), st.booleans())
def test_the_search_ends_just_on_the_safe_side_of_any_falling_cost(scale, power, target, steep):
    def cost(x):
        return math.inf if steep and x < 0.01 else scale * x**-power

    root = (scale / target) ** (1 / power)
    if not 1e-2 < root < 1e6:
        return
    found = smallest_meeting(cost, target, guess=1.0, low=1e-3, high=1e9)
    assert cost(found) <= target
    assert found <= max(root, 0.01) * (1 + 2e-4)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_largest_count_is_exact(threshold, most):
    assert largest_count_meeting(lambda n: float(n), float(threshold), most=most) == min(threshold, most)
