"""Smoothing and shrinkage of an averaged update, beside their definitions."""

import numpy as np
import pytest

from common.config import RunConfig, smoothing_strength
from common.errors import InvalidInput
from server.postprocess import shrunk, smoothed


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1,), (2,)])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_laplacian_smoothing_solves_its_linear_system(shape, strength):
    array = np.random.default_rng(0).normal(size=shape)
    found = smoothed({"x": array}, strength)["x"].reshape(-1)
    size = array.size
    back = found + strength * (2 * found - np.roll(found, 1) - np.roll(found, -1))
    assert found.shape == (size,)
    np.testing.assert_allclose(back, array.reshape(-1), atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_smoothing_leaves_the_stated_share_of_white_noise(strength):
    noise = np.random.default_rng(1).normal(size=200_000)
    left = float(np.mean(smoothed({"x": noise}, strength)["x"] ** 2))
    assert left == pytest.approx((1 + 2 * strength) / (1 + 4 * strength) ** 1.5, rel=0.03)


def test_smoothing_keeps_the_mean_and_none_keeps_everything():
    array = np.random.default_rng(2).normal(size=(5, 3))
    assert smoothed({"x": array}, 1.0)["x"].mean() == pytest.approx(array.mean())
    assert smoothed({"x": array}, 0.0)["x"] is array


def low_rank(rng, rows, columns, strength):
    return strength * np.outer(rng.normal(size=rows), rng.normal(size=columns))


@pytest.mark.parametrize(("rows", "columns"), [(200, 8), (8, 200), (60, 60)])
def test_shrinkage_brings_a_noised_low_rank_matrix_nearer_to_itself(rows, columns):
    rng = np.random.default_rng(3)
    signal = low_rank(rng, rows, columns, 1.0)
    noised = signal + 0.7 * rng.normal(size=signal.shape)
    found = shrunk({"x": noised}, {"x": 0.7})["x"]
    assert np.sum((found - signal) ** 2) < 0.5 * np.sum((noised - signal) ** 2)


def test_shrinkage_makes_nothing_of_noise_alone():
    noise = 0.7 * np.random.default_rng(4).normal(size=(300, 100))
    left = shrunk({"x": noise}, {"x": 0.75})["x"]
    assert np.sum(left**2) < 1e-6 * np.sum(noise**2)


def test_without_known_noise_and_for_vectors_nothing_is_shrunk():
    matrix, vector = np.ones((4, 4)), np.ones(4)
    found = shrunk({"m": matrix, "v": vector}, {"m": 0.0, "v": 3.0})
    assert found["m"] is matrix
    assert found["v"] is vector


@pytest.mark.parametrize(
    "setting", ["laplacian", "laplacian:0", "laplacian:-1", "laplacian:nan", "gauss:1", "laplacian:x"]
)
def test_a_smoothing_that_is_none_is_refused(setting):
    with pytest.raises(ValueError, match="laplacian:SIGMA"):
        smoothing_strength(setting)
    with pytest.raises(InvalidInput, match="smoothing"):
        RunConfig.from_mapping({"smoothing": setting})
