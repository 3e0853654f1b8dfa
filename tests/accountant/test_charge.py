"""What a fixed list of events costs, and which data sets may hold the same records."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import privacy
from common.charge import Charge, charge, merged, related
from common.privacy import PLDAccountant, RDPAccountant, SampledGaussian, TooLarge

events = st.lists(
    st.builds(
        SampledGaussian,
        noise_multiplier=st.sampled_from([0.8, 1.0]),
        sample_rate=st.sampled_from([0.01, 0.02]),
        steps=st.integers(1, 30),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(events, st.randoms())
def test_merging_keeps_every_step_and_forgets_the_order(listed, random):
    shuffled = list(listed)
    random.shuffle(shuffled)
    assert merged(listed) == merged(shuffled)
    assert sum(event.steps for event in merged(listed)) == sum(event.steps for event in listed)
    assert len({(event.noise_multiplier, event.sample_rate) for event in merged(listed)}) == len(merged(listed))


@settings(max_examples=8, deadline=None)
@given(events.filter(lambda listed: sum(event.steps for event in listed) >= 40))
def test_the_merged_list_costs_what_the_list_costs(listed):
    found = charge(listed, relation="add_remove", delta=1e-5)
    assert found.epsilon == pytest.approx(PLDAccountant().compose_all(listed).epsilon(1e-5), rel=1e-3)
    assert found.epsilon <= found.epsilon_rdp


def test_nothing_costs_nothing():
    assert charge([], relation="add_remove", delta=1e-5) == Charge(0.0, 0.0)


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="relation must be one of"):
        charge([SampledGaussian(1.0)], relation="friends", delta=1e-5)


def test_without_a_pld_bound_the_renyi_bound_stands_in(monkeypatch):
    class Silent(PLDAccountant):
        def epsilon(self, delta):
            raise TooLarge("beyond the limits")

    monkeypatch.setattr(privacy, "PLDAccountant", Silent)
    event = SampledGaussian(1.23456, 0.01, 100)
    found = charge([event], relation="add_remove", delta=1e-5)
    expected = RDPAccountant().compose(event).epsilon(delta=1e-5)
    assert found == Charge(expected, expected)
    assert math.isfinite(expected)


def test_without_any_bound_nothing_fits(monkeypatch):
    class Silent:
        def __init__(self, relation):
            self.relation = relation

        def compose_all(self, _events):
            raise TooLarge("beyond the limits")

    monkeypatch.setattr(privacy, "PLDAccountant", Silent)
    monkeypatch.setattr(privacy, "RDPAccountant", Silent)
    found = charge([SampledGaussian(1.3456, 0.01, 100)], relation="add_remove", delta=1e-5)
    assert found == Charge(math.inf, math.inf)


def test_replacing_a_record_costs_more():
    event = SampledGaussian(1.0, 0.01, 100)
    removed, replaced = (charge([event], relation=r, delta=1e-5) for r in ("add_remove", "replace_one"))
    assert replaced.epsilon > removed.epsilon
    assert replaced.epsilon_rdp > removed.epsilon_rdp


def test_data_sets_are_linked_through_names_and_groups():
    members = [("notes", None), ("labs", "patients"), ("notes", "patients"), ("other", None), ("far", "else")]
    assert related(members, "labs", None) == [0, 1, 2]
    assert related(members, "other", "else") == [3, 4]
    assert related(members, "new", None) == []
    assert related(members, "new", "patients") == [0, 1, 2]
