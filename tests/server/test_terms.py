"""The terms of a run are public, fixed, and cost what they say."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig
from common.errors import InvalidInput
from common.messages import Description
from common.privacy import PLDAccountant
from server.terms import RunTerms, default_batch_size, draw_up, participation_order


def description(name="a", declared=1000, **changes) -> Description:
    values = {
        "client": name, "dataset": name, "public_key": "key", "declared_records": declared, "backbone_hash": "b",
        "shapes": {"x": (2,)}, "trained": ("x",), "initial_hash": "i",
    }  # fmt: skip
    return Description(**(values | changes))


def terms(names=("a", "b"), **settings) -> RunTerms:
    config = RunConfig.from_mapping({"rounds": 6, "expected-batch-size": 20} | settings)
    return draw_up(config, [description(name) for name in names], "run")


def epsilon(client, relation="add_remove") -> float:
    return PLDAccountant(relation=relation).compose_all(client.envelope.events).epsilon(client.target_delta)


names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


@given(names, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_clients_are_dealt_evenly_publicly_and_never_twice_into_one_round(clients, rounds, per_round, seed):
    order = participation_order(clients, rounds, per_round, seed)
    assert order == participation_order(list(reversed(clients)), rounds, per_round, seed)
    assert len(order) == rounds
    for hand in order:
        assert len(hand) == len(set(hand)) == min(per_round, len(clients))
        assert list(hand) == sorted(hand)
    counts = Counter(name for hand in order for name in hand)
    played = [counts.get(name, 0) for name in clients]
    assert max(played) - min(played) <= 1


def test_everybody_takes_part_where_nothing_is_said():
    assert participation_order(["b", "a"], 3, None, 0) == (("a", "b"),) * 3


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_calibrated_noise_reaches_the_target_from_below(relation):
    found = terms(relation=relation, **{"target-epsilon": 2.0, "local-steps": 3})
    for client in found.clients:
        assert len(client.envelope.events) == 6
        assert all(event.steps == 3 for event in client.envelope.events)
        assert 1.95 < epsilon(client, relation) <= 2.0


def test_clients_may_have_budgets_of_their_own():
    found = terms(**{"target-epsilon": 4.0, "clients": {"a": {"target-epsilon": 1.0, "target-delta": 1e-6}}})
    a, b = found.client("a"), found.client("b")
    assert (a.target_epsilon, a.target_delta, b.target_epsilon) == (1.0, 1e-6, 4.0)
    assert epsilon(a) <= 1.0 < epsilon(b) <= 4.0
    assert a.envelope.events[0].noise_multiplier > b.envelope.events[0].noise_multiplier


def test_a_given_noise_states_the_epsilon_it_costs():
    found = terms(**{"noise-multiplier": 1.5})
    for client in found.clients:
        assert client.envelope.events[0].noise_multiplier == 1.5
        assert client.target_epsilon == pytest.approx(epsilon(client), abs=1e-12)


def test_a_given_noise_with_a_small_target_takes_as_many_rounds_as_fit():
    full = terms(**{"noise-multiplier": 0.8})
    small = terms(**{"noise-multiplier": 0.8, "target-epsilon": full.client("a").target_epsilon * 0.9})
    client = small.client("a")
    taken = client.envelope.events
    assert 0 < len(taken) < 6
    assert epsilon(client) <= client.target_epsilon
    one_more = PLDAccountant().compose_all((*taken, taken[0])).epsilon(client.target_delta)
    assert one_more > client.target_epsilon


def test_a_target_below_one_round_is_refused():
    with pytest.raises(InvalidInput, match="not even one round"):
        terms(**{"noise-multiplier": 0.3, "target-epsilon": 0.1})


def test_a_batch_above_the_declared_size_is_refused_by_name():
    with pytest.raises(InvalidInput, match=r"a: expected-batch-size 2000 is above its 1000 declared records"):
        terms(**{"expected-batch-size": 2000})


def test_a_batch_of_all_declared_records_is_allowed():
    assert terms(**{"expected-batch-size": 1000}).clients[0].envelope.events[0].sample_rate == 1.0


def test_a_client_that_nobody_is_is_named():
    config = RunConfig.from_mapping({"clients": {"c": {"target-epsilon": 1}}})
    with pytest.raises(InvalidInput, match=r"\[clients\.c\]: no such client; there are a, b"):
        draw_up(config, [description("a"), description("b")], "run")


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_a_delta_that_permits_publishing_a_record_is_refused(delta):
    with pytest.raises(InvalidInput, match="publishing"):
        terms(**{"target-delta": delta, "allow-large-delta": True})


def test_a_large_delta_needs_the_flag():
    with pytest.raises(InvalidInput, match="allow-large-delta"):
        terms(**{"target-delta": 5e-5})
    assert terms(**{"target-delta": 5e-5, "allow-large-delta": True}).clients[0].target_delta == 5e-5


def test_clients_with_another_backbone_do_not_train_together():
    with pytest.raises(InvalidInput, match="same backbone"):
        draw_up(RunConfig(), [description("a"), description("b", backbone_hash="other")], "run")


def test_weights_are_equal_or_follow_the_declared_sizes():
    described = [description("a", 1000), description("b", 3000)]
    config = {"rounds": 2, "expected-batch-size": 20}
    equal = draw_up(RunConfig.from_mapping(config), described, "run")
    assert {client.weight for client in equal.clients} == {1.0}
    declared = draw_up(RunConfig.from_mapping(config | {"weights": "declared"}), described, "run")
    assert [client.weight for client in declared.clients] == [0.25, 0.75]


def test_participation_counts_the_rounds_before():
    found = terms(names=("a", "b", "c"), **{"clients-per-round": 1, "rounds": 7})
    for name in "abc":
        played = [r for r, hand in enumerate(found.participants, start=1) if name in hand]
        assert [found.participation(name, r) for r in played] == list(range(len(played)))
        assert len(found.client(name).envelope.events) == len(played)


@pytest.mark.parametrize("settings", [{}, {"no-privacy": True}, {"clients-per-round": 1}, {"noise-multiplier": 1.0}])
def test_terms_survive_json_and_keep_their_hash(settings):
    found = terms(**settings)
    again = RunTerms.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.plan_hash == found.plan_hash


def test_without_privacy_nothing_is_promised():
    found = terms(**{"no-privacy": True})
    for client in found.clients:
        assert client.clipping_norm == 0.0
        assert (client.envelope, client.target_epsilon, client.target_delta) == (None, None, None)
        assert client.noise_on_the_mean == 0.0


@given(st.integers(1, 10**7))
def test_the_default_batch_is_possible(declared):
    assert 1 <= default_batch_size(declared) <= declared


SCHEDULES = ["step", "exponential", "cosine", "lr-matched"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_a_noise_schedule_is_calibrated_as_a_whole(schedule, relation):
    settings = {"noise-schedule": schedule, "server-schedule": "linear", "target-epsilon": 2.0, "relation": relation}
    found = terms(**settings)
    for client in found.clients:
        sigmas = [event.noise_multiplier for event in client.envelope.events]
        assert len(sigmas) == 6
        assert sigmas == sorted(sigmas, reverse=schedule != "lr-matched")
        assert sigmas[0] != sigmas[-1]
        assert 1.99 < epsilon(client, relation) <= 2.0


def test_noise_matched_to_the_learning_rate_grows_as_its_square_root_falls():
    found = terms(**{"noise-schedule": "lr-matched", "server-schedule": "linear"}).client("a")
    sigmas = [event.noise_multiplier for event in found.envelope.events]
    assert [sigma / sigmas[0] for sigma in sigmas] == pytest.approx([(1 - t / 6) ** -0.5 for t in range(6)])


def test_a_schedule_from_a_given_noise_starts_there_and_states_what_it_costs():
    found = terms(**{"noise-schedule": "exponential", "noise-multiplier": 2.0, "noise-final": 0.25}).client("a")
    sigmas = [event.noise_multiplier for event in found.envelope.events]
    assert (sigmas[0], sigmas[-1]) == (2.0, 0.5)
    assert found.target_epsilon == pytest.approx(epsilon(found), abs=1e-12)


def test_who_sits_out_a_round_skips_its_noise():
    settings = {"noise-schedule": "cosine", "clients-per-round": 1, "rounds": 6}
    found = terms(names=("a", "b"), **settings)
    whole = terms(names=("a", "b"), **{**settings, "clients-per-round": 2}).client("a").envelope.events
    for name in "ab":
        client = found.client(name)
        played = [t for t, hand in enumerate(found.participants) if name in hand]
        ratios = [event.noise_multiplier for event in client.envelope.events]
        expected = [whole[t].noise_multiplier / whole[0].noise_multiplier for t in played]
        assert [r / ratios[0] for r in ratios] == pytest.approx([e / expected[0] for e in expected])
        assert epsilon(client) <= client.target_epsilon


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scheduled_run_pays_what_its_plan_says(tmp_path, schedule):
    """``cloister plan --config`` and the accountant of a run agree to 1e-9."""
    from deploy.planning.config import plan_from_config

    file = tmp_path / "run.toml"
    file.write_text(
        f'rounds = 5\nnoise-schedule = "{schedule}"\nserver-schedule = "cosine"\nexpected-batch-size = 20\n'
        "target-epsilon = 3\n[clients.a]\ndeclared-records = 1000\n[clients.b]\ndeclared-records = 400\n"
    )
    report = plan_from_config(file)
    config = RunConfig.load(file, {})
    found = draw_up(config, [description("a", 1000), description("b", 400)], "run")
    for cost in report.clients:
        client, pld = found.client(cost.name), PLDAccountant()
        for event in client.envelope.events:
            pld = pld.compose(event)
        assert cost.epsilon == pytest.approx(pld.epsilon(client.target_delta), abs=1e-9)
        assert cost.epsilon <= 3.0
