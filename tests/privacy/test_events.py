import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy import SampledGaussian, events_from_json, events_to_json
from common.privacy.events import checked

events = st.builds(
    SampledGaussian,
    noise_multiplier=st.floats(1e-3, 1e6),
    sample_rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, 10**9),
)


@given(events)
def test_an_event_reads_back_exactly(event):
    assert SampledGaussian.from_json(event.to_json()) == event
    assert SampledGaussian.from_json(json.loads(event.to_json())) == event


@given(st.lists(events, max_size=5))
def test_a_list_of_events_reads_back_exactly(listed):
    assert events_from_json(events_to_json(listed)) == tuple(listed)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("noise_multiplier", 0, "> 0"),
        ("noise_multiplier", -1.0, "> 0"),
        ("noise_multiplier", float("nan"), "> 0"),
        ("noise_multiplier", float("inf"), "> 0"),
        ("noise_multiplier", "1", "> 0"),
        ("noise_multiplier", True, "> 0"),
        ("noise_multiplier", None, "> 0"),
        ("sample_rate", 0, "(0, 1]"),
        ("sample_rate", 1.0000001, "(0, 1]"),
        ("sample_rate", float("nan"), "(0, 1]"),
        ("sample_rate", [0.1], "(0, 1]"),
        ("steps", 0, ">= 1"),
        ("steps", 1.5, ">= 1"),
        ("steps", 10.0, ">= 1"),
        ("steps", True, ">= 1"),
        ("steps", "3", ">= 1"),
    ],
)
def test_a_bad_field_is_named_with_value_and_range(field, value, said):
    fields = {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1, field: value}
    with pytest.raises(ValueError, match=field) as caught:
        SampledGaussian(**fields)
    assert said in str(caught.value)
    assert repr(value) in str(caught.value)


def test_events_are_frozen_and_count_as_values():
    event = SampledGaussian(1, 0.5, 2)
    with pytest.raises(AttributeError):
        event.steps = 3
    assert {event: 1}[SampledGaussian(1.0, 0.5, 2)] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"version": "1"},
        {"kind": "laplace"},
        {"kind": None},
        {"extra": 1},
        {"steps": None},
    ],
)
def test_an_event_of_another_version_or_kind_is_refused(change):
    record = {**SampledGaussian(1.0, 0.1, 5).to_dict(), **change}
    with pytest.raises(ValueError, match=next(iter(change)).replace("extra", "fields")):
        SampledGaussian.from_json(json.dumps(record))


def test_a_missing_field_is_refused():
    record = SampledGaussian(1.0, 0.1, 5).to_dict()
    del record["sample_rate"]
    with pytest.raises(ValueError, match="sample_rate"):
        SampledGaussian.from_json(record)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", b"\xff"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match="event must be"):
        SampledGaussian.from_json(text)


@pytest.mark.parametrize("text", ["{}", "x", "[1]", '[{"kind": "sampled_gaussian"}]'])
def test_what_is_no_list_of_events_is_refused(text):
    with pytest.raises(ValueError, match=r"event|version"):
        events_from_json(text)


def test_anything_else_in_a_list_is_refused_before_use():
    with pytest.raises(ValueError, match="dict"):
        checked([SampledGaussian(1.0), {"noise_multiplier": 1.0}])
