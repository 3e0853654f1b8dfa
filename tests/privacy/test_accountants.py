"""One contract for every accountant; an Edgeworth accountant is asked for its estimate."""

import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.privacy import EdgeworthAccountant, PLDAccountant, RDPAccountant, SampledGaussian
from common.privacy.composition import clear_caches

BOUNDS = [PLDAccountant, RDPAccountant]
# What an answer may differ by between two lists that are not equal as multisets: PLD's grid costs up to 4e-4.
LOOSE = 1e-3


class Estimator:
    """An Edgeworth accountant behind the contract's names."""

    def __init__(self, relation="add_remove", held=None):
        self.held = held or EdgeworthAccountant(2, tilted=True, relation=relation)

    @property
    def events(self):
        return self.held.events

    def compose(self, *events):
        return Estimator(held=self.held.compose(*events))

    def compose_all(self, events):
        return Estimator(held=self.held.compose_all(events))

    def epsilon(self, delta):
        return self.held.estimate(delta).epsilon


ALL = [*BOUNDS, Estimator]
every = pytest.mark.parametrize("accountant", ALL)
bound = pytest.mark.parametrize("accountant", BOUNDS)

noises, rates = st.sampled_from([0.7, 1.0, 1.6]), st.sampled_from([0.01, 0.05, 1.0])
kinds = st.builds(SampledGaussian, noises, rates, st.integers(1, 40))
lists = st.lists(kinds, min_size=1, max_size=4)
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@every
def test_nothing_composed_costs_nothing(accountant):
    assert accountant().epsilon(1e-5) == 0.0
    assert accountant().events == ()


@every
@pytest.mark.parametrize("relation", ["add_remove", "zero_out", "replace_one"])
def test_every_relation_gives_a_finite_epsilon(accountant, relation):
    event = SampledGaussian(1.0, 0.05, 200)
    found = accountant(relation).compose(event).epsilon(1e-5)
    assert 1 < found < 20


@every
def test_zero_out_costs_what_add_remove_costs(accountant):
    event = SampledGaussian(1.0, 0.02, 100)
    assert accountant("zero_out").compose(event).epsilon(1e-5) == accountant().compose(event).epsilon(1e-5)


@every
def test_replace_one_costs_more_than_add_remove(accountant):
    event = SampledGaussian(1.0, 0.02, 300)
    assert accountant("replace_one").compose(event).epsilon(1e-5) > accountant().compose(event).epsilon(1e-5)


@every
def test_an_unknown_relation_is_refused(accountant):
    with pytest.raises(ValueError, match="relation must be one of"):
        accountant("neighbours")


@every
@pytest.mark.parametrize("stranger", [None, 1.0, "event", {"noise_multiplier": 1.0}, object()])
def test_an_unknown_event_is_refused_and_nothing_is_composed(accountant, stranger):
    start = accountant().compose(SampledGaussian(1.0, 0.1))
    with pytest.raises(ValueError, match="event must be a SampledGaussian"):
        start.compose(SampledGaussian(1.0, 0.1), stranger)
    assert len(start.events) == 1


@every
@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, "1e-5", None, True, 1e-16, 1e-300])
def test_a_bad_delta_is_refused_by_name(accountant, delta):
    with pytest.raises(ValueError, match="delta must be"):
        accountant().compose(SampledGaussian(1.0, 0.1)).epsilon(delta)


@bound
@pytest.mark.parametrize("epsilon", [-1e-9, math.nan, math.inf, "1", True])
def test_a_bad_epsilon_is_refused_by_name(accountant, epsilon):
    with pytest.raises(ValueError, match="epsilon must be"):
        accountant().compose(SampledGaussian(1.0, 0.1)).delta(epsilon)


@every
def test_composing_returns_a_new_accountant(accountant):
    first = accountant().compose(SampledGaussian(1.0, 0.05, 50))
    before = first.epsilon(1e-5)
    second = first.compose(SampledGaussian(1.0, 0.05, 50))
    assert first.epsilon(1e-5) == before
    assert second.epsilon(1e-5) > before
    assert len(first.events) == 1
    assert len(second.events) == 2


@every
@few
@given(lists, st.randoms(use_true_random=False))
def test_the_order_of_composition_does_not_matter(accountant, listed, random):
    shuffled = random.sample(listed, len(listed))
    one, other = accountant().compose(*listed).epsilon(1e-5), accountant()
    clear_caches()  # or the second list would be given the first one's answer
    for event in shuffled:
        other = other.compose(event)
        other.epsilon(1e-5)  # asked along the way, as a server would: must not change the answer
    assert other.epsilon(1e-5) == pytest.approx(one, rel=1e-9)


@every
@few
@given(kinds, st.integers(1, 39))
def test_splitting_steps_changes_nothing(accountant, event, at):
    if at >= event.steps:
        at = event.steps - 1
    if not at:
        return
    sigma, q = event.noise_multiplier, event.sample_rate
    parts = [SampledGaussian(sigma, q, at), SampledGaussian(sigma, q, event.steps - at)]
    whole = accountant().compose(event).epsilon(1e-5)
    clear_caches()
    assert accountant().compose_all(parts).epsilon(1e-5) == pytest.approx(whole, rel=1e-9)


@bound
@few
@given(lists, kinds)
def test_one_more_event_never_lowers_epsilon(accountant, listed, event):
    before, after = accountant().compose(*listed), accountant().compose(*listed, event)
    assert after.epsilon(1e-5) >= before.epsilon(1e-5) * (1 - LOOSE)


@bound
@few
@given(st.floats(0.5, 4.0), st.floats(1.02, 2.0), st.sampled_from([0.01, 0.3, 1.0]), st.integers(1, 300))
def test_epsilon_falls_as_the_noise_grows(accountant, sigma, factor, q, steps):
    louder = accountant().compose(SampledGaussian(sigma * factor, q, steps)).epsilon(1e-5)
    assert louder <= accountant().compose(SampledGaussian(sigma, q, steps)).epsilon(1e-5) * (1 + LOOSE)


@bound
@few
@given(st.floats(0.6, 4.0), st.floats(1e-3, 0.4), st.floats(1.02, 2.0), st.integers(1, 300))
def test_epsilon_grows_with_the_sample_rate(accountant, sigma, q, factor, steps):
    more = accountant().compose(SampledGaussian(sigma, q * factor, steps)).epsilon(1e-5)
    assert more >= accountant().compose(SampledGaussian(sigma, q, steps)).epsilon(1e-5) * (1 - LOOSE)


@bound
@few
@given(lists, st.sampled_from([1e-10, 1e-8, 1e-5, 1e-3]), st.floats(1.5, 100))
def test_epsilon_falls_as_delta_grows(accountant, listed, delta, factor):
    held = accountant().compose(*listed)
    assert held.epsilon(delta * factor) <= held.epsilon(delta) * (1 + LOOSE)


@bound
@few
@given(lists)
def test_delta_falls_as_epsilon_grows(accountant, listed):
    held = accountant().compose(*listed)
    deltas = [held.delta(epsilon) for epsilon in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert all(0 <= delta <= 1 for delta in deltas)
    assert all(low <= high * (1 + LOOSE) + 1e-18 for high, low in pairwise(deltas))


@bound
@few
@given(lists, st.sampled_from([1e-10, 1e-6, 1e-3]))
def test_delta_inverts_epsilon(accountant, listed, delta):
    held = accountant().compose(*listed)
    epsilon = held.epsilon(delta)
    assert held.delta(epsilon * (1 + LOOSE) + 1e-9) <= delta * (1 + 1e-6)
    if epsilon > 0.01:
        assert held.delta(epsilon * (1 - 5 * LOOSE)) > delta


@every
def test_the_answer_to_a_question_asked_again_is_the_same(accountant):
    held = accountant().compose(SampledGaussian(0.9, 0.03, 70))
    assert held.epsilon(1e-6) == held.epsilon(1e-6)
