"""A plan's mechanism becomes the engine's rule, and every rule costs the σ that the plan is charged at."""

import numpy as np
import pytest
import torch
from torch import nn

from client.engine import AdaptiveClipping, FlatClipping, GroupClipping, ShapedClipping
from client.engine.clipping import sound_noise_std
from client.engine.layout import Layout
from client.engine.mechanism import adaptation, rule_maker
from common.errors import InvalidInput
from common.mechanism import Mechanism, module_of

SIZES = {"q.lora_A.weight": 60, "q.lora_B.weight": 40, "v.lora_B.weight": 9, "head.weight": 4, "head.bias": 2}


class Model(nn.Module):
    """Trainable tensors with the names and sizes above; torch forbids dots in names of its own."""

    def __init__(self):
        super().__init__()
        for index, size in enumerate(SIZES.values()):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(size)))

    def named_parameters(self, *_, **__):
        return [(name, getattr(self, f"p{i}")) for i, name in enumerate(SIZES)]


LAYOUT = Layout(Model())
SCALES = tuple(sorted((name, 0.5 + i) for i, name in enumerate(SIZES)))


@pytest.mark.parametrize("clipping", ["fixed", "adaptive", "automatic"])
@pytest.mark.parametrize(
    ("allocation", "kind"), [("uniform", FlatClipping), ("min-energy", GroupClipping), ("importance", ShapedClipping)]
)
def test_every_combination_hides_a_record_as_its_multiplier_says(clipping, allocation, kind):
    mechanism = Mechanism(clipping, allocation, SCALES if allocation == "importance" else ())
    assert mechanism.problem(1.0) is None
    rule = rule_maker(mechanism, LAYOUT)(0.8)
    assert isinstance(rule, kind)
    assert (rule.stability is not None) == (clipping == "automatic")
    assert rule.hides(LAYOUT, sound_noise_std(rule, LAYOUT, 1.7)) == pytest.approx(1.7, rel=1e-9)


def test_least_energy_clips_per_module_and_asks_for_less_noise_than_equal_shares():
    rule = rule_maker(Mechanism(noise_allocation="min-energy"), LAYOUT)(0.8)
    assert [set(group.names) for group in rule.groups] == [
        {"q.lora_A.weight", "q.lora_B.weight"}, {"v.lora_B.weight"}, {"head.weight", "head.bias"},
    ]  # fmt: skip
    assert np.linalg.norm([group.clipping_norm for group in rule.groups]) == pytest.approx(0.8)
    energy = float((rule.noise_std(LAYOUT, 2.0) ** 2).sum())
    assert energy < LAYOUT.num_parameters * (2.0 * 0.8) ** 2


def test_before_there_are_scales_importance_is_flat():
    assert rule_maker(Mechanism(noise_allocation="importance"), LAYOUT)(0.8) == FlatClipping(0.8)


def test_scales_that_forget_a_tensor_are_refused():
    rule = rule_maker(Mechanism(noise_allocation="importance", scales=SCALES[1:]), LAYOUT)(0.8)
    with pytest.raises(InvalidInput, match="every trainable parameter"):
        sound_noise_std(rule, LAYOUT, 1.0)


def test_an_unknown_allocation_is_refused():
    with pytest.raises(InvalidInput, match="weighted"):
        rule_maker(Mechanism(noise_allocation="weighted"), LAYOUT)


def test_only_adaptive_clipping_adapts():
    assert adaptation(Mechanism()) is None
    assert adaptation(Mechanism("adaptive", count_noise=3.0)) == AdaptiveClipping(0.5, 0.2, 1e-3, 1e3, 3.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clipping": "loose"}, "clipping must be"),
        ({"noise_allocation": "weighted"}, "noise_allocation must be"),
        ({"scales": (("a", 1.0),)}, "scales are for importance"),
        ({"noise_allocation": "importance", "scales": (("b", 1.0), ("a", 1.0))}, "sorted"),
        ({"noise_allocation": "importance", "scales": (("a", 1.0), ("a", 1.0))}, "once"),
        ({"noise_allocation": "importance", "scales": (("a", 0.0),)}, "> 0"),
        ({"noise_allocation": "importance", "scales": (("a", float("nan")),)}, "> 0"),
        ({"noise_allocation": "importance", "scales": (("a", 1),)}, "> 0"),
        ({"noise_allocation": "importance", "scales": (("a", 1.0), ("b", 1001.0))}, "1000"),
        ({"noise_allocation": "importance", "scales": 3}, "iterable"),
        ({"clipping": "adaptive", "count_noise": 0.5}, "count_noise_std must be above"),
        ({"clipping": "adaptive", "count_noise": 0.0}, "> 0"),
        ({"quantile": 1.0}, "quantile"),
        ({"lower": 2.0, "upper": 1.0}, "lower"),
        ({"clipping_rate": "fast"}, "> 0"),
    ],
)
def test_settings_out_of_range_have_a_problem(changes, said):
    assert said in Mechanism(**changes).problem(noise_multiplier=1.0)


def test_without_privacy_only_the_plain_form_is_allowed():
    assert Mechanism().problem(None) is None
    assert "without privacy" in Mechanism("automatic").problem(None)


def test_a_mechanism_survives_json():
    import json

    mechanism = Mechanism("adaptive", "importance", SCALES, 0.3, 0.1, 0.01, 5.0, 7.0)
    again = Mechanism.from_json(json.loads(json.dumps(mechanism.to_json())))
    assert again == mechanism
    with pytest.raises(TypeError, match="keys"):
        Mechanism.from_json(mechanism.to_json() | {"weights": []})


def test_a_tensor_belongs_to_its_layer():
    assert module_of("x.q_proj.lora_A.weight") == module_of("x.q_proj.lora_B.weight") == "x.q_proj"
    assert module_of("classifier.bias") == "classifier"
    assert module_of("bare") == "bare"
