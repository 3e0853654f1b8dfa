"""The demo's records: repeatable, different from silo to silo, and never shared with the evaluation set."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInput
from deploy.demo.records import SILO_SIZES, SILO_TASKS, TASKS, demo_evaluation, demo_silos, generate

SEEDS = st.integers(min_value=0, max_value=2**32)
OPENINGS = {
    "note": "Summarise the note.",
    "triage": "Give the code.",
    "visit": "Confirm the visit.",
    "letter": "Answer the letter",
    "form": "Fill in the form.",
    "desk": "Name the desk.",
}


def tasks_in(records):
    return Counter(next(task for task, start in OPENINGS.items() if r["prompt"].startswith(start)) for r in records)


@pytest.mark.parametrize("silo", SILO_TASKS)
def test_the_same_seed_gives_the_same_records_and_a_longer_list_begins_with_the_shorter(silo):
    records = generate(silo, 50, seed=3)
    assert records == generate(silo, 50, seed=3)
    assert records == generate(silo, 80, seed=3)[:50]
    assert records != generate(silo, 50, seed=4)


def test_a_silo_can_be_asked_for_by_its_position():
    for position, name in enumerate(sorted(SILO_TASKS)):
        assert generate(position, 5, seed=1) == generate(name, 5, seed=1)


@pytest.mark.parametrize("silo", ["south-clinic", 4, -1, ""])
def test_an_unknown_silo_is_refused_and_the_known_ones_are_named(silo):
    with pytest.raises(InvalidInput, match="north-clinic"):
        generate(silo, 1, seed=0)


def test_a_negative_count_is_refused():
    with pytest.raises(InvalidInput, match="count"):
        generate(0, -1, seed=0)


def test_the_demo_has_four_silos_of_their_declared_sizes():
    silos = demo_silos(0)
    assert {name: len(records) for name, records in silos.items()} == dict(SILO_SIZES)
    assert len(silos) == 4
    assert all(2000 <= len(records) <= 3000 for records in silos.values())


def test_each_silo_has_its_own_mixture_in_the_stated_weights():
    for name, records in demo_silos(0).items():
        seen, weights = tasks_in(records), SILO_TASKS[name]
        assert set(seen) == set(weights)
        for task, weight in weights.items():  # 2,000 draws: a share is within 0.05 of its weight (5 standard errors)
            assert seen[task] / len(records) == pytest.approx(weight / sum(weights.values()), abs=0.05)
    mixtures = {tuple(sorted(weights.items())) for weights in SILO_TASKS.values()}
    assert len(mixtures) == len(SILO_TASKS)


@settings(max_examples=10, deadline=None)
@given(SEEDS, SEEDS)
def test_no_silo_under_any_seed_holds_a_prompt_of_the_evaluation_under_any_seed(silo_seed, evaluation_seed):
    public = {record["prompt"] for record in demo_evaluation(evaluation_seed, count=300)}
    for name in SILO_TASKS:
        assert public.isdisjoint(record["prompt"] for record in generate(name, 300, seed=silo_seed))


def test_the_evaluation_holds_every_task_in_about_equal_parts():
    seen = tasks_in(demo_evaluation(0))
    assert sum(seen.values()) == 400
    assert set(seen) == set(TASKS)
    assert min(seen.values()) > 40


def test_what_a_reply_must_hold_stands_in_its_prompt():
    for record in generate("city-bank", 200, seed=0):
        if record["prompt"].startswith("Fill in the form."):
            fields = dict(part.split(": ") for part in record["completion"].rstrip(".").split(". "))
            assert all(fields[field] in record["prompt"] for field in ("Name", "Amount", "Day"))


def test_records_are_plain_text_pairs():
    for record in demo_evaluation(0):
        assert set(record) == {"prompt", "completion"}
        assert record["prompt"].isascii()
        assert record["completion"].isascii()
        assert record["completion"] == record["completion"].strip()
