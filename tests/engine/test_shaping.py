"""Shaping per module follows what was released, keeps the noise's power, and starves no module on a guess."""

import numpy as np
import pytest
import torch
from torch import nn

from client.engine import ModuleShaper
from client.engine.layout import Layout
from common.errors import InvalidInput


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.loud, self.quiet, self.silent = (nn.Parameter(torch.zeros(n)) for n in (400, 900, 300))


LAYOUT = Layout(Three())
TRUE = {"loud": 3.0, "quiet": 0.3, "silent": 0.0}


def released(rng, noise_std):
    signal = np.concatenate([rng.normal(0, TRUE[name] + 1e-12, slot.size) for name, slot in LAYOUT.slots.items()])
    return signal + rng.normal(0, 1, LAYOUT.num_parameters) * noise_std


def trained(noise_std, steps=60, **settings):
    rng, shaper = np.random.default_rng(0), ModuleShaper(LAYOUT, **settings)
    for _ in range(steps):
        shaper.observe(released(rng, noise_std).astype(np.float32), noise_std)
    return shaper


def test_scales_follow_the_fourth_root_of_the_signal_s_square():
    scales = trained(0.1).rule(1.0).scales
    assert scales["loud"] / scales["quiet"] == pytest.approx((3.0 / 0.3) ** 0.5, rel=0.03)
    assert scales["silent"] < scales["quiet"]


def test_the_total_noise_variance_is_that_of_unshaped_noise():
    rule = trained(0.1).rule(0.7)
    assert float((rule.noise_std(LAYOUT, 2.0) ** 2).sum()) == pytest.approx(LAYOUT.num_parameters * (2.0 * 0.7) ** 2)


def test_noise_alone_moves_nothing_far():
    rng, shaper = np.random.default_rng(1), ModuleShaper(LAYOUT)
    for _ in range(60):
        shaper.observe(rng.normal(0, 5.0, LAYOUT.num_parameters), 5.0)
    scales = shaper.rule(1.0).scales
    assert max(scales.values()) / min(scales.values()) < 1.5


def test_shaped_noise_is_taken_off_where_it_was_added():
    std = np.concatenate([np.full(slot.size, 0.05 * (i + 1)) for i, slot in enumerate(LAYOUT.slots.values())])
    rng, shaper = np.random.default_rng(2), ModuleShaper(LAYOUT)
    for _ in range(60):
        shaper.observe(released(rng, std), std)
    scales = shaper.rule(1.0).scales
    assert scales["loud"] / scales["quiet"] == pytest.approx(10**0.5, rel=0.05)


def test_scales_stay_within_the_widest_ratio():
    scales = trained(1e-6, widest=4.0).rule(1.0).scales
    assert max(scales.values()) / min(scales.values()) == pytest.approx(4.0)


def test_nothing_observed_and_everything_forgotten_mean_no_shaping():
    shaper = trained(0.1)
    shaper.forget()
    for rule in (shaper.rule(1.0), ModuleShaper(LAYOUT).rule(1.0)):
        assert set(rule.scales.values()) == {1.0}


@pytest.mark.parametrize("wrong", [{"memory": 1.0}, {"memory": -0.1}, {"widest": 0.5}, {"widest": 2e3}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidInput):
        ModuleShaper(LAYOUT, **wrong)
