"""The server's side of clipping and noise: from public settings and released averages to each round's mechanism."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from client.engine.layout import Layout
from client.engine.mechanism import rule_maker
from common.config import RunConfig
from common.errors import InvalidInput
from common.mechanism import Mechanism, active_tensors, module_of
from common.messages import Description
from common.privacy import PLDAccountant
from server.aggregation import ServerOptimizer, WeightedMean
from server.mechanism import Importance, mechanism_for, update_noise
from server.terms import draw_up

SHAPES = {"q.lora_A.weight": (2, 9), "q.lora_B.weight": (5, 2), "v.lora_B.weight": (3, 2), "head.bias": (4,)}


def description(name, declared=1000):
    return Description(name, name, "key", declared, "b", SHAPES, tuple(SHAPES), "i")


def terms(described=None, **settings):
    config = RunConfig.from_mapping({"rounds": 4, "expected-batch-size": 20} | settings)
    return draw_up(config, described or [description("a"), description("b")], "run")


def first(found, name="a"):
    client = found.client(name)
    return client, client.envelope.events[0]


# --- settings of one organisation -------------------------------------------------------------------------------------


def test_an_organisation_may_have_steps_threshold_noise_and_budget_of_its_own():
    own = {"a": {"local-steps": 3, "clipping-norm": 0.5, "target-epsilon": 2.0}, "b": {"noise-multiplier": 1.25}}
    found = terms(clients=own, **{"local-steps": 2, "clipping-norm": 4.0})
    a, b = found.client("a"), found.client("b")
    assert (a.local_steps, a.clipping_norm, b.local_steps, b.clipping_norm) == (3, 0.5, 2, 4.0)
    assert {event.steps for event in a.envelope.events} == {3}
    assert {event.noise_multiplier for event in b.envelope.events} == {1.25}
    assert 1.98 < PLDAccountant().compose_all(a.envelope.events).epsilon(a.target_delta) <= 2.0
    assert a.noise_on_the_mean == a.envelope.events[0].noise_multiplier * 0.5 / 20


def test_inverse_variance_weights_are_those_of_the_least_noisy_mean():
    own = {"a": {"noise-multiplier": 1.0}, "b": {"noise-multiplier": 2.0, "local-steps": 4}}
    found = terms(clients=own, weights="inverse-variance")
    weights = np.array([found.client(name).weight for name in "ab"])
    variance = np.array([1.0, 4 * 2.0**2])
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, (1 / variance) / (1 / variance).sum())
    step = np.array([0.01, -0.01])
    for other in ([0.5, 0.5], weights + step, weights - step):
        assert (weights**2 * variance).sum() < (np.asarray(other) ** 2 * variance).sum()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"no-privacy": True, "clipping": "automatic"}, "no-privacy"),
        ({"no-privacy": True, "noise-allocation": "min-energy"}, "no-privacy"),
        ({"weights": "inverse-variance", "clipping": "adaptive"}, "fixed C"),
        ({"weights": "inverse-variance", "no-privacy": True}, "fixed C"),
        ({"shrinkage": "spectral", "optimizer": "adam"}, "sgd"),
        ({"shrinkage": "spectral", "clipping": "adaptive"}, "adaptive"),
        ({"shrinkage": "spectral", "no-privacy": True}, "privacy"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(settings, said):
    with pytest.raises(InvalidInput, match=said):
        terms(**settings)


# --- mechanism and noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("batch", [20, 800])
def test_the_count_of_adaptive_clipping_never_costs_more_than_the_step(noise, batch):
    found = terms(clipping="adaptive", **{"noise-multiplier": noise, "expected-batch-size": batch})
    client, event = first(found)
    mechanism = mechanism_for(found, client, event, ())
    assert mechanism.problem(event.noise_multiplier) is None
    assert mechanism.count_noise == max(batch / 20, 2 * noise)


def test_without_privacy_the_mechanism_is_plain():
    found = terms(**{"no-privacy": True})
    assert mechanism_for(found, found.client("a"), None, ()) == Mechanism()


class Model(nn.Module):
    """Trainable tensors of the shapes above; torch forbids dots in names of its own."""

    def __init__(self):
        super().__init__()
        for index, shape in enumerate(SHAPES.values()):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape)))

    def named_parameters(self, *_, **__):
        return [(name, getattr(self, f"p{i}")) for i, name in enumerate(SHAPES)]


LAYOUT = Layout(Model())
SCALES = tuple(sorted((name, 0.5 + i) for i, name in enumerate(SHAPES)))


@pytest.mark.parametrize("allocation", ["uniform", "min-energy", "importance"])
def test_the_server_knows_the_noise_that_the_engine_adds(allocation):
    found = terms(**{"noise-allocation": allocation, "local-steps": 3, "learning-rate": 0.7, "clipping-norm": 0.4})
    client, event = first(found)
    mechanism = mechanism_for(found, client, event, SCALES)
    stds = update_noise(found, client, event, mechanism, SHAPES)
    added = np.broadcast_to(
        rule_maker(mechanism, LAYOUT)(0.4).noise_std(LAYOUT, event.noise_multiplier), LAYOUT.num_parameters
    )
    for name, slot in LAYOUT.slots.items():
        assert stds[name] == pytest.approx(0.7 * math.sqrt(3) * added[slot.offset] / 20)


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"clipping": "adaptive"}])
def test_where_noise_is_not_public_none_is_claimed(settings):
    found = terms(**settings)
    client, event = first(found)
    assert update_noise(found, client, event, mechanism_for(found, client, event, ()), SHAPES) == {}


def test_the_noise_of_a_mean_adds_up_by_the_squares_of_its_weights():
    mean = WeightedMean({"x": (2,)})
    update = {"x": np.ones(2, np.float32)}
    mean.add(update, 1.0, {"x": 3.0})
    mean.add(update, 2.0, {"x": 1.0})
    assert mean.noise_std()["x"] == pytest.approx(math.hypot(3.0, 2.0) / 3)


# --- importance -------------------------------------------------------------------------------------------------------


def observed(rounds=20, loud="q"):
    importance, rng = Importance(SHAPES), np.random.default_rng(0)
    for _ in range(rounds):
        adapter = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
        update = {n: rng.normal(size=s) * (100.0 if n.startswith(loud) else 1.0) for n, s in SHAPES.items()}
        importance.observe(adapter, update, list(SHAPES))
    return importance


def test_an_important_module_gets_less_noise_and_all_together_as_much_as_before():
    scales = dict(observed().scales())
    assert sorted(scales) == sorted(SHAPES)
    assert scales["q.lora_A.weight"] == scales["q.lora_B.weight"] < scales["v.lora_B.weight"]
    power = sum(math.prod(SHAPES[name]) * scale**2 for name, scale in scales.items())
    assert power == pytest.approx(sum(math.prod(shape) for shape in SHAPES.values()))
    assert max(scales.values()) / min(scales.values()) <= Importance.WIDEST * (1 + 1e-12)


def test_before_every_module_has_moved_there_are_no_scales():
    importance = Importance(SHAPES)
    assert importance.scales() == ()
    zero = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    importance.observe(zero, {name: np.ones(shape) for name, shape in SHAPES.items()}, list(SHAPES))
    assert importance.scales() == ()


def test_scales_are_what_a_guard_admits():
    mechanism = Mechanism(noise_allocation="importance", scales=observed().scales())
    assert mechanism.problem(1.0) is None


def test_importance_goes_on_from_its_state():
    whole, again = observed(), Importance(SHAPES)
    again.restore(whole.state())
    assert again.scales() == whole.scales()


def test_scales_follow_released_averages_only_and_survive_a_restart(federation, trainer):
    """Two runs whose clients differ in all but their replies get the same scales; a restart changes nothing."""
    rng = np.random.default_rng(1)
    noise = [
        {n: rng.normal(size=s).astype(np.float32) for n, s in {"layer.lora_B": (4, 2), "other.lora_B": (3,)}.items()}
        for _ in range(4)
    ]
    one = trainer("a")
    one.behave = lambda request: type(one.ordinary(request))(
        noise[request.plan.server_round - 1], request.reservation.reservation.reservation_id, "0" * 64
    )
    fed = federation([one], rounds=4, **{"noise-allocation": "importance"})
    stops = iter([False, False, True])
    fed.loop(should_stop=lambda: next(stops)).run()
    assert len(one.seen) == 2
    fed.loop().run()
    sent = [request.plan.mechanism.scales for request in one.seen]
    assert sent[0] == ()
    assert sent[-1] != ()
    importance = Importance({n: a.shape for n, a in one.seen[0].adapter.items()})
    for server_round, request in enumerate(one.seen):
        assert request.plan.mechanism.scales == importance.scales()
        importance.observe(
            request.adapter, {n: a.astype(np.float64) for n, a in noise[server_round].items()}, list(request.adapter)
        )


# --- RoLoRA -----------------------------------------------------------------------------------------------------------


def test_a_resting_factor_keeps_its_place_and_its_moments():
    names = ["q.lora_A.weight", "q.lora_B.weight", "head.bias"]
    rng, adapter = np.random.default_rng(2), {name: np.zeros(2, np.float32) for name in names}
    turns, alone = ServerOptimizer("fedadam", 0.1), ServerOptimizer("fedadam", 0.1)
    b_only = {"q.lora_B.weight": np.zeros(2, np.float32)}
    for server_round in range(1, 7):
        mean = {name: rng.normal(size=2) for name in names}
        active = active_tensors("rolora", server_round, names)
        before = adapter
        adapter = turns.step(adapter, mean, active=active)
        for name in names:
            assert np.array_equal(adapter[name], before[name]) == (name not in active)
        if server_round % 2:
            b_only = alone.step(b_only, {"q.lora_B.weight": mean["q.lora_B.weight"]})
    np.testing.assert_array_equal(adapter["q.lora_B.weight"], b_only["q.lora_B.weight"])


def test_heads_move_in_every_round():
    assert all("head.bias" in active_tensors("rolora", t, list(SHAPES)) for t in range(1, 5))
    assert active_tensors("fedavg", 2, list(SHAPES)) == tuple(SHAPES)
    assert module_of("head.bias") == "head"
