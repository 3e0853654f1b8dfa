"""The noise is normal, of the charged size, unrepeatable and rounded to a public grid; a release adds just that."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from client.engine import (
    AdaptiveClipping,
    Group,
    GroupClipping,
    NoiseSource,
    ShapedClipping,
    adaptive_step,
    make_engine,
    private_step,
)
from client.engine.noise import grid_step
from client.engine.step import release
from common.errors import CloisterError, InvalidInput

LEAST_P = 1e-4


def p_values(draws, std):
    """Kolmogorov-Smirnov and chi-square (1,000 equally likely cells) against N(0, std²)."""
    uniform = stats.norm.cdf(draws / std)
    cells = np.bincount(np.minimum((uniform * 1000).astype(int), 999), minlength=1000)
    return stats.kstest(uniform, "uniform").pvalue, stats.chisquare(cells).pvalue


def is_normal(draws, std):
    return min(p_values(draws, std)) > LEAST_P


@pytest.mark.parametrize("count", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_draws_are_standard_normal(count):
    draws = NoiseSource.seeded(20, "r").normal(count)
    assert draws.dtype == np.float64
    assert is_normal(draws, 1.0)
    assert not is_normal(0.99 * draws, 1.0)


@pytest.mark.parametrize("count", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_released_noise_is_normal_of_the_charged_size(count):
    noise_std, batch = 1.3 * 0.7, 192.0
    released = release(np.zeros(count), noise_std, batch, NoiseSource.seeded(21, "r"))
    assert released.dtype == np.float32
    assert is_normal(released.astype(np.float64), noise_std / batch)
    assert not is_normal(0.9 * released.astype(np.float64), noise_std / batch)


class ZeroGradients:
    """An engine whose records all have gradient zero: what it releases is noise and nothing else."""

    def __init__(self, size):
        self.layout, self.size = None, size

    def clipped_sum(self, examples, rule):
        return torch.zeros(self.size)


def test_a_client_with_zero_gradients_releases_exactly_the_noise_it_was_charged_for():
    released = (
        private_step(
            ZeroGradients(10**6),
            [],
            clipping_norm=0.8,
            noise_multiplier=2.5,
            expected_batch_size=64,
            noise=NoiseSource.seeded(22, "r"),
        )
        .double()
        .numpy()
    )
    assert is_normal(released, 2.5 * 0.8 / 64)
    assert not is_normal(0.9 * released, 2.5 * 0.8 / 64)
    assert np.array_equal(released, np.rint(released / grid_step(2.0 / 64)) * grid_step(2.0 / 64))


def test_every_parameter_gets_its_noise_in_a_real_engine(build):
    engine = make_engine(build("llama", "all"), task="causal-lm", pad_token_id=0, max_length=12)
    steps = [
        private_step(engine, [], clipping_norm=0.5, noise_multiplier=3.0, expected_batch_size=10,
                     noise=NoiseSource.seeded(i, "r")).double().numpy()
        for i in range(300)
    ]  # fmt: skip
    released = np.stack(steps)
    assert is_normal(released.reshape(-1), 3.0 * 0.5 / 10)
    assert np.allclose(released.std(0), 0.15, rtol=0.3)  # no coordinate without noise
    correlation = np.corrcoef(released[:, ::37].T) - np.eye(len(released[0, ::37]))
    assert np.abs(correlation).max() < 6 / np.sqrt(300)


@pytest.mark.parametrize("kind", ["shaped", "groups"])
def test_rules_bring_their_own_noise(build, kind):
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    names = list(engine.parameters)
    scales = {name: 1.0 + 9.0 * (i % 2) for i, name in enumerate(names)}
    if kind == "shaped":
        rule, wanted = ShapedClipping(0.5, scales), {name: 2.0 * 0.5 * scales[name] for name in names}
    else:
        rule = GroupClipping((Group(tuple(names[::2]), 0.5, 0.36), Group(tuple(names[1::2]), 0.2, 0.64)))
        wanted = {name: 2.0 * (0.5 / 0.6 if i % 2 == 0 else 0.2 / 0.8) for i, name in enumerate(names)}
    steps = [
        private_step(engine, [], clipping_norm=rule, noise_multiplier=2.0, expected_batch_size=8,
                     noise=NoiseSource.seeded(i, kind)).double()
        for i in range(200)
    ]  # fmt: skip
    for name, part in engine.layout.unflatten(torch.arange(engine.num_parameters)).items():
        draws = torch.stack([step[part.reshape(-1)] for step in steps]).numpy().reshape(-1)
        assert is_normal(draws, wanted[name] / 8)


def test_the_mean_of_releases_is_the_clipped_sum(build, make_examples):
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    examples = make_examples("causal-lm")
    exact = engine.clipped_sum(examples, 0.5).double().numpy() / 5
    released = private_step(
        engine,
        examples,
        clipping_norm=0.5,
        noise_multiplier=1.0,
        expected_batch_size=5,
        noise=NoiseSource.seeded(1, "r"),
    )
    noise = NoiseSource.seeded(1, "r").normal(engine.num_parameters) * 0.5 / 5
    assert np.allclose(released.double().numpy() - exact, noise, atol=float(grid_step(0.1)), rtol=1e-6)


def test_adaptive_step_charges_the_gradient_for_the_count(build, make_examples):
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    settings = AdaptiveClipping(quantile=0.5, learning_rate=1.0, lower=1e-6, upper=1e6, count_noise=2.0)
    examples, fractions = make_examples("causal-lm"), []
    norms = [float(engine.clipped_sum([example], 1e6).norm()) for example in examples]
    middle = sorted(norms)[2] * 1.001  # three of five are unclipped
    released = []
    for i in range(400):
        gradient, following = adaptive_step(
            engine, examples if i < 100 else [], clipping_norm=middle, settings=settings, noise_multiplier=3.0,
            expected_batch_size=10.0, noise=NoiseSource.seeded(i, "a"),
        )  # fmt: skip
        fractions.append(0.5 - np.log(following / middle))
        if i >= 100:
            released.append(gradient.double().numpy())
    z = (3.0**-2 - 4.0**-2) ** -0.5
    assert is_normal(np.concatenate(released), z * middle / 10.0)
    counted = np.array(fractions[:100])
    assert counted.mean() == pytest.approx(0.5 + (3 - 2.5) / 10, abs=4 * 0.2 / 10)  # (Σ(b − ½)) / expected batch
    assert np.array(fractions).std() == pytest.approx(0.2, rel=0.15)


def test_keys_and_purposes_give_independent_streams():
    one, same, other = NoiseSource.seeded(1, "a"), NoiseSource.seeded(1, "a"), NoiseSource.seeded(1, "b")
    draws = one.normal(20000)
    assert np.array_equal(draws, same.normal(20000))
    for stranger in (
        other.normal(20000),
        NoiseSource.seeded(2, "a").normal(20000),
        same.generator().standard_normal(20000),
    ):
        assert abs(np.corrcoef(draws, stranger)[0, 1]) < 0.04
    fresh = [NoiseSource.fresh("a").normal(4) for _ in range(2)]
    assert not np.array_equal(*fresh)


def test_a_source_is_neither_stored_nor_copied():
    source = NoiseSource.fresh("r")
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never stored"):
            attempt(source)


def test_a_source_does_not_survive_a_fork(monkeypatch):
    source = NoiseSource.fresh("r")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(CloisterError, match="fork"):
        source.normal(1)
    with pytest.raises(CloisterError, match="fork"):
        source.generator()


def test_a_rule_for_another_model_is_refused_before_a_record_is_read(build, make_examples):
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    with pytest.raises(InvalidInput, match="must name every trainable parameter"):
        engine.clipped_sum(make_examples("causal-lm"), ShapedClipping(1.0, {"other": 1.0}))


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 33])
def test_a_key_has_256_bits(key):
    with pytest.raises(InvalidInput, match="32 bytes"):
        NoiseSource(key)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clipping_norm": 0.0},
        {"clipping_norm": -1.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"expected_batch_size": 0.0},
        {"expected_batch_size": float("inf")},
    ],
)
def test_public_settings_out_of_range_are_refused(wrong):
    settings = {"clipping_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0} | wrong
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        private_step(ZeroGradients(3), [], **settings, noise=NoiseSource.seeded(0, "r"))
