import math

import numpy as np
import pytest

from common.privacy import PLDAccountant, SampledGaussian
from common.privacy.schedules import KINDS, noise_schedule, shape

FIXED = {"rounds": 8, "steps": 5, "sample_rate": 0.1, "target_epsilon": 4.0, "target_delta": 1e-5}
RATES = [1 / math.sqrt(1 + t) for t in range(8)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_every_schedule_meets_its_target_and_hardly_stays_below(kind, relation):
    held = noise_schedule(kind, relation=relation, learning_rates=RATES, **FIXED)
    again = PLDAccountant(relation).compose_all(held.events).epsilon(1e-5)
    assert again == pytest.approx(held.epsilon, rel=1e-9)
    assert 4.0 * (1 - 2e-3) <= held.epsilon <= 4.0
    assert [event.steps for event in held.events] == [5] * 8
    assert {event.sample_rate for event in held.events} == {0.1}


def test_the_shapes():
    assert shape("constant", 3).tolist() == [1, 1, 1]
    assert shape("step", 5, drop=0.5, every=2).tolist() == [1, 1, 0.5, 0.5, 0.25]
    assert shape("exponential", 3, final=0.25) == pytest.approx([1, 0.5, 0.25])
    assert shape("cosine", 3, final=0.5) == pytest.approx([1, 0.75, 0.5])
    assert shape("lr-matched", 3, learning_rates=[1, 0.25, 0.04]) == pytest.approx([1, 2, 5])
    assert shape("cosine", 1).tolist() == [1]


def test_unsampled_step_decay_has_a_closed_form():
    """mu² = (s/sigma_0²) sum over drops of rho^(-2j): the stepwise schedule's own accounting."""
    relative = shape("step", 6, drop=0.5, every=2)
    events = [SampledGaussian(float(10 * r)) for r in relative]
    mu = math.sqrt(2 / 100 * sum(0.5 ** (-2 * j) for j in range(3)))
    from common.privacy import gdp_epsilon

    assert PLDAccountant().compose_all(events).epsilon(1e-5) == pytest.approx(gdp_epsilon(mu, 1e-5), rel=1e-9)


def test_noise_matched_to_the_learning_rate_minimises_what_reaches_the_weights():
    """Of all lists with the same sum of squares of 1/sigma, sum (lr sigma)² is smallest for sigma ~ lr^(-1/2)."""
    rates = np.array(RATES)
    matched = shape("lr-matched", 8, learning_rates=RATES)
    budget = np.sum(1 / matched**2)
    best = np.sum((rates * matched) ** 2)
    for kind in ("constant", "exponential", "cosine", "step"):
        other = shape(kind, 8)
        other = other * math.sqrt(np.sum(1 / other**2) / budget)
        assert np.sum((rates * other) ** 2) >= best * (1 - 1e-12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rounds": 0}, "rounds"),
        ({"final": 0}, "final"),
        ({"drop": -1}, "drop"),
        ({"every": 0}, "every"),
        ({"learning_rates": [1.0]}, "learning_rates"),
        ({"learning_rates": None}, "learning_rates"),
        ({"learning_rates": [0.0] * 8}, "learning_rates"),
    ],
)
def test_a_bad_field_is_named(change, named):
    fields = {"learning_rates": RATES, "rounds": 8, **change}
    with pytest.raises(ValueError, match=named):
        shape("lr-matched", **fields)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        shape("zigzag", 3)


def test_a_target_no_noise_meets_is_refused():
    with pytest.raises(ValueError, match="is not met"):
        noise_schedule("constant", **{**FIXED, "target_epsilon": 1e-9, "target_delta": 1e-15})
