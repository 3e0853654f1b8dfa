"""Clipping rules: what every row's norm is at most, and what noise the rules ask for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from client.engine import AdaptiveClipping, FlatClipping, Group, GroupClipping, ShapedClipping
from client.engine.clipping import row_norms, slot_norms, sound_noise_std
from client.engine.layout import Arena, Layout, arena_bytes
from common.errors import InvalidInput
from common.privacy.allocation import group_noise_multiplier, weighted_noise_multiplier


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(3, 500)), nn.Parameter(torch.zeros(7))


LAYOUT = Layout(Two())
RULES = {
    "flat": lambda c: FlatClipping(c),
    "shaped": lambda c: ShapedClipping(c, {"first": 3.0, "second": 0.25}),
    "groups": lambda c: GroupClipping((Group(("first",), c, 0.3), Group(("second",), c / 3, 0.7))),
    "automatic": lambda c: FlatClipping(c, stability=0.01),
    "automatic, shaped": lambda c: ShapedClipping(c, {"first": 3.0, "second": 0.25}, stability=0.01),
    "automatic, groups": lambda c: GroupClipping(
        (Group(("first",), c, 0.3), Group(("second",), c / 3, 0.7)), stability=0.01
    ),
}


def filled(values):
    arena = Arena(LAYOUT)
    arena.begin(len(values), LAYOUT.slots)
    rows = arena.finish()
    rows[:, : LAYOUT.num_parameters] = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return arena, rows


def length(rule, vector):
    """The contribution's sensitivity in units of the noise: must be at most 1/σ for every row."""
    std = rule.noise_std(LAYOUT, 1.0)
    return float(np.linalg.norm(vector.double().numpy()[: LAYOUT.num_parameters] / std))


finite = arrays(np.float32, LAYOUT.num_parameters, elements=st.sampled_from([0, 1e-30, 1e-8, 0.5, -3, 1e4, -1e15]))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(row=finite, threshold=st.sampled_from([1e-6, 0.1, 1.0, 300.0]))
def test_the_norm_of_every_summed_row_is_at_most_its_threshold(name, row, threshold):
    rule = RULES[name](threshold)
    arena, rows = filled([row])
    total = arena.vector()
    rule.add(rows, LAYOUT, total)
    assert length(rule, total) <= 1.0


@pytest.mark.parametrize("name", RULES)
def test_one_record_more_moves_the_sum_by_at_most_the_threshold(name):
    rule, rng = RULES[name](0.7), np.random.default_rng(0)
    values = rng.normal(size=(9, LAYOUT.num_parameters)) * rng.lognormal(sigma=3, size=(9, 1))
    arena, rows = filled(values)
    with_all, without = arena.vector(), arena.vector()
    rule.add(rows.clone(), LAYOUT, with_all)
    rule.add(rows[1:].clone(), LAYOUT, without)
    assert length(rule, with_all - without) <= 1.0 + 1e-5


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_row_that_is_not_finite_counts_zero(name, bad):
    rule, rng = RULES[name](0.7), np.random.default_rng(0)
    values = rng.normal(size=(4, LAYOUT.num_parameters))
    arena, rows = filled(values)
    wanted = arena.vector()
    rule.add(rows[1:].clone(), LAYOUT, wanted)
    values[0, :3] = bad
    arena, rows = filled(values)
    total = arena.vector()
    ratio = rule.add(rows, LAYOUT, total)
    assert torch.equal(total, wanted)
    assert torch.isinf(ratio[0])


def test_flat_clipping_is_its_definition():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(5, LAYOUT.num_parameters)) * np.array([[0.001], [0.01], [0.1], [1], [10]])
    arena, rows = filled(values)
    total = arena.vector()
    ratio = FlatClipping(2.0).add(rows, LAYOUT, total)
    norms = np.linalg.norm(values, axis=1)
    wanted = (values * np.minimum(1, 2.0 / norms)[:, None]).sum(0)
    assert np.linalg.norm(total[: LAYOUT.num_parameters].numpy() - wanted) < 2e-6 * np.linalg.norm(wanted)
    assert np.allclose(ratio, norms / 2.0, rtol=1e-6)


def test_norms_are_accurate_where_a_plain_float32_sum_is_not():
    torch.manual_seed(0)
    rows = torch.rand(2, 1024 * 2000)
    exact = rows.double().norm(dim=1)
    assert float(((row_norms(rows) - exact).abs() / exact).max()) < 1e-7


def test_slot_norms_add_up_to_row_norms():
    _, rows = filled(np.random.default_rng(2).normal(size=(3, LAYOUT.num_parameters)))
    parts = torch.stack([slot_norms(rows, LAYOUT, name) for name in LAYOUT.slots])
    assert torch.allclose(parts.square().sum(0).sqrt(), row_norms(rows), rtol=1e-7)


@settings(max_examples=50, deadline=None)
@given(
    thresholds=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2),
    share=st.floats(0.01, 0.99),
    multiplier=st.floats(0.1, 20),
)
def test_group_noise_costs_exactly_one_gaussian_of_the_stated_multiplier(thresholds, share, multiplier):
    rule = GroupClipping((Group(("first",), thresholds[0], share), Group(("second",), thresholds[1], 1.0 - share)))
    std = rule.noise_std(LAYOUT, multiplier)
    worst = (thresholds[0] / std[0]) ** 2 + (thresholds[1] / std[-1]) ** 2
    assert worst == pytest.approx(multiplier**-2, rel=1e-9)


def test_the_cheapest_groups_cost_the_same_and_have_less_variance():
    names, norms = {"a": ("first",), "b": ("second",)}, {"a": 1.0, "b": 0.5}
    cheapest = GroupClipping.cheapest(LAYOUT, norms, names)
    halves = GroupClipping((Group(("first",), 1.0, 0.5), Group(("second",), 0.5, 0.5)))
    assert (cheapest.noise_std(LAYOUT, 2.0) ** 2).sum() < (halves.noise_std(LAYOUT, 2.0) ** 2).sum()
    std = cheapest.noise_std(LAYOUT, 2.0)
    assert group_noise_multiplier([1.0, 0.5], [std[0], std[-1]]) == pytest.approx(2.0, rel=1e-9)


def test_importance_weights_under_ordinary_clipping_would_cost_their_minimum():
    # what ShapedClipping does not do: the same scales on the noise alone, with |g| <= C
    scales = {"first": 1.5, "second": 0.5}
    rule = ShapedClipping(1.0, scales)
    arena, rows = filled([[0.0] * 1500 + [1.0] + [0.0] * 6])  # the worst record lies along the smallest scale
    shaped, ordinary = arena.vector(), arena.vector()
    rule.add(rows.clone(), LAYOUT, shaped)
    FlatClipping(1.0).add(rows.clone(), LAYOUT, ordinary)
    assert length(rule, shaped) <= 1.0
    assert length(rule, ordinary) == pytest.approx(1 / 0.5, rel=1e-5)
    assert weighted_noise_multiplier(1.0, list(scales.values())) == pytest.approx(0.5)


def test_shaping_by_one_is_flat_clipping():
    values = np.random.default_rng(3).normal(size=(4, LAYOUT.num_parameters))
    arena, rows = filled(values)
    flat, shaped = arena.vector(), arena.vector()
    FlatClipping(0.5).add(rows.clone(), LAYOUT, flat)
    rule = ShapedClipping(0.5, {"first": 1.0, "second": 1.0})
    rule.add(rows.clone(), LAYOUT, shaped)
    assert torch.allclose(flat, shaped, rtol=1e-5, atol=1e-9)
    assert set(np.unique(rule.noise_std(LAYOUT, 2.0))) == {1.0}


def test_equal_groups_keep_the_whole_norm():
    rule = GroupClipping.equal(LAYOUT, 2.0, {"a": ("first",), "b": ("second",)})
    assert math.hypot(*(group.clipping_norm for group in rule.groups)) == pytest.approx(2.0)
    with pytest.raises(InvalidInput, match="second"):
        GroupClipping.equal(LAYOUT, 2.0, {"a": ("first",)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlatClipping(0.0),
        lambda: FlatClipping(-1.0),
        lambda: FlatClipping(math.nan),
        lambda: FlatClipping(math.inf),
        lambda: ShapedClipping(1.0, {"first": 0.0, "second": 1.0}),
        lambda: ShapedClipping(1.0, {"first": 1e4, "second": 1.0}),
        lambda: ShapedClipping(1.0, {}),
        lambda: GroupClipping((Group(("first",), 1.0, 0.5), Group(("second",), 1.0, 0.6))),
        lambda: GroupClipping((Group(("first",), 1.0, 0.5), Group(("first",), 1.0, 0.5))),
        lambda: GroupClipping((Group(("first",), 0.0, 1.0),)),
        lambda: GroupClipping((Group(("first",), 1.0, 1.5), Group(("second",), 1.0, -0.5))),
        lambda: GroupClipping(()),
    ],
)
def test_bad_rules_are_refused(make):
    with pytest.raises(InvalidInput):
        make()


@pytest.mark.parametrize("rule", [ShapedClipping(1.0, {"first": 1.0}), GroupClipping((Group(("first",), 1.0, 1.0),))])
def test_a_rule_that_forgets_a_parameter_is_refused(rule):
    with pytest.raises(InvalidInput, match="second"):
        rule.check(LAYOUT)
    with pytest.raises(InvalidInput, match="second"):
        rule.noise_std(LAYOUT, 1.0)


def adaptive(**changes):
    return AdaptiveClipping(
        **({"quantile": 0.5, "learning_rate": 0.2, "lower": 0.1, "upper": 4, "count_noise": 5} | changes)
    )


@settings(max_examples=50, deadline=None)
@given(z=st.floats(0.1, 9.9))
def test_count_and_gradient_together_cost_the_stated_multiplier(z):
    # two Gaussians with sensitivities 1 (of C) and 1/2 (of a count): the squares of sensitivity over noise add up
    z_gradient = adaptive().gradient_noise_multiplier(z)
    assert z_gradient > z
    assert z_gradient**-2 + (0.5 / 5) ** 2 == pytest.approx(z**-2, rel=1e-9)


def test_the_threshold_follows_the_quantile():
    rng, rule, norm = np.random.default_rng(0), adaptive(learning_rate=0.3, lower=1e-3, upper=1e3), 50.0
    for _ in range(200):
        norms = rng.lognormal(size=1000)
        norm = rule.next(norm, float((norms <= norm).mean()))
    assert norm == pytest.approx(1.0, rel=0.1)  # the median of lognormal(0, 1)


def test_the_threshold_stays_in_its_public_range():
    assert adaptive().next(1.0, unclipped_fraction=1e9) == 0.1
    assert adaptive().next(1.0, unclipped_fraction=-1e9) == 4


@pytest.mark.parametrize(
    "changes",
    [{"quantile": 0}, {"quantile": 1}, {"learning_rate": 0}, {"lower": 0}, {"lower": 5}, {"count_noise": 0}],
)
def test_bad_adaptive_settings_are_refused(changes):
    with pytest.raises(InvalidInput):
        adaptive(**changes)


@pytest.mark.parametrize("z", [10.0, 11.0, 0.0, -1.0])
def test_a_count_that_costs_more_than_the_step_is_refused(z):
    with pytest.raises(InvalidInput, match=r"count_noise|noise_multiplier"):
        adaptive().gradient_noise_multiplier(z)


def test_arena_bytes_are_what_an_example_takes():
    arena, _ = filled(np.ones((3, LAYOUT.num_parameters)))
    assert arena.bytes_per_example == arena.rows[0].numel() * 4 == arena_bytes([(3, 500), (7,)])


@pytest.mark.parametrize("name", RULES)
def test_the_noise_of_every_rule_hides_a_record_as_its_multiplier_says(name):
    rule = RULES[name](0.7)
    assert rule.hides(LAYOUT, sound_noise_std(rule, LAYOUT, 1.3)) == pytest.approx(1.3, rel=1e-9)


class WeightedNoise(FlatClipping):
    """The unsound reading of importance: weights of mean 1 on the noise, ordinary clipping."""

    def noise_std(self, layout, noise_multiplier):
        return ShapedClipping(self.clipping_norm, {"first": 1.001, "second": 0.25}).noise_std(layout, noise_multiplier)


def test_importance_weights_under_plain_clipping_are_refused_before_a_record_is_read():
    rule = WeightedNoise(1.0)
    assert rule.hides(LAYOUT, rule.noise_std(LAYOUT, 2.0)) == pytest.approx(
        weighted_noise_multiplier(2.0, [1.001, 0.25])
    )
    with pytest.raises(InvalidInput, match=r"amounts to a noise multiplier of 0.5, but 2 is charged"):
        sound_noise_std(rule, LAYOUT, 2.0)
    scaled = ShapedClipping(1.0, {"first": 1.001, "second": 0.25})
    assert np.array_equal(sound_noise_std(scaled, LAYOUT, 2.0), rule.noise_std(LAYOUT, 2.0))


def test_automatic_clipping_makes_every_row_almost_as_long_as_the_threshold():
    values = np.random.default_rng(4).normal(size=(3, LAYOUT.num_parameters)) * np.array([[1e-3], [1.0], [1e3]])
    for row in values:
        arena, rows = filled([row])
        total = arena.vector()
        FlatClipping(2.0, stability=0.01).add(rows, LAYOUT, total)
        norm = np.linalg.norm(row)
        found = total[: LAYOUT.num_parameters].numpy()
        np.testing.assert_allclose(found, 2.0 * row / (norm + 0.01), rtol=1e-5)


def test_automatic_clipping_keeps_zero_at_zero():
    arena, rows = filled(np.zeros((1, LAYOUT.num_parameters)))
    total = arena.vector()
    FlatClipping(2.0, stability=0.01).add(rows, LAYOUT, total)
    assert not total.any()


@pytest.mark.parametrize("stability", [0.0, -1.0, math.nan, math.inf])
def test_a_stability_constant_out_of_range_is_refused(stability):
    with pytest.raises(InvalidInput, match="stability"):
        FlatClipping(1.0, stability)


def test_no_threshold_is_so_small_that_float32_squares_vanish_below_it():
    """Entries of 1e-25 have a norm of 0 in float32: under C = 1e-30 their row stayed five million times as long."""
    for make in RULES.values():
        with pytest.raises(InvalidInput, match="1e-10"):
            make(1e-30)
    with pytest.raises(InvalidInput, match="1e-10"):
        ShapedClipping(1e-6, {"first": 1e-7, "second": 1e-6})


@pytest.mark.parametrize("entry", [1e-25, 1e-22, 3e-20, 1e-19, 1e-12])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_tiny_entries_stay_within_the_least_threshold(name, entry):
    rule = RULES[name](1e-9)
    arena, rows = filled(np.full((1, LAYOUT.num_parameters), entry))
    total = arena.vector()
    rule.add(rows, LAYOUT, total)
    assert length(rule, total) <= 1.0


@pytest.mark.parametrize("place", [0, 1, 100, 500, 1023])
@pytest.mark.parametrize("square", [2.9e-8, 5.9e-8, 1.1e-7])
def test_a_large_entry_does_not_hide_the_small_ones_from_the_norm(place, square):
    """Squares just below half a unit in the last place of their running sum are rounded away, all in one direction."""
    rows = torch.full((1, 4096), math.sqrt(square))
    rows[0, place::1024] = 1.0
    exact = float(torch.linalg.vector_norm(rows.double()))
    assert float(row_norms(rows)) >= exact * (1 - 6e-7), "MARGIN leaves 9.5e-7 for the norm and the product"
