"""Means with public weights, and the server's optimizers beside torch's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import InvalidInput
from server.aggregation import ServerOptimizer, WeightedMean, check_update

SHAPES = {"a": (3, 2), "b": (4,)}
finite = arrays(np.float32, (3,), elements=st.floats(-1e3, 1e3, width=32))


def update(value=1.0, **changes):
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()} | changes


@given(st.lists(st.tuples(finite, st.floats(0.01, 100)), min_size=1, max_size=6))
def test_the_mean_is_numpys_weighted_average(parts):
    mean = WeightedMean({"x": (3,)})
    for array, weight in parts:
        mean.add({"x": array}, weight)
    expected = np.average([a.astype(np.float64) for a, _ in parts], axis=0, weights=[w for _, w in parts])
    np.testing.assert_allclose(mean.mean()["x"], expected, rtol=1e-9, atol=1e-9)
    assert mean.count == len(parts)


def test_memory_does_not_grow_with_the_number_of_updates():
    mean = WeightedMean(SHAPES)
    mean.add(update(), 1.0)
    held = dict(mean._sum)
    for _ in range(50):
        mean.add(update(), 1.0)
    assert all(mean._sum[name] is array for name, array in held.items())


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (update(a=np.full((3, 2), np.nan, np.float32)), "not finite"),
        (update(a=np.full((3, 2), np.inf, np.float32)), "not finite"),
        (update(a=np.zeros((2, 3), np.float32)), "shape"),
        (update(a=np.zeros((3, 2), np.float64)), "dtype"),
        (update(a=np.zeros((3, 2), np.int32)), "dtype"),
        (update(c=np.zeros(1, np.float32)), "one side only"),
        ({"a": np.zeros((3, 2), np.float32)}, "one side only"),
        ({}, "one side only"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_and_changes_nothing(bad, match):
    mean = WeightedMean(SHAPES)
    mean.add(update(2.0), 1.0)
    with pytest.raises(InvalidInput, match=match):
        mean.add(bad, 1.0)
    assert mean.count == 1
    np.testing.assert_array_equal(mean.mean()["a"], np.full((3, 2), 2.0))


def test_nothing_added_has_no_mean():
    with pytest.raises(InvalidInput, match="no update"):
        WeightedMean(SHAPES).mean()


def test_a_fitting_update_passes():
    check_update(update(), SHAPES)


@pytest.mark.parametrize(("kind", "rate"), [("fedadam", 0.03), ("fedavg", 0.7), ("fedavgm", 0.2)])
def test_server_optimizers_are_torchs_with_the_update_as_negative_gradient(kind, rate):
    import torch

    rng = np.random.default_rng(3)
    start = {"x": rng.normal(size=(5, 3)).astype(np.float32)}
    parameter = torch.nn.Parameter(torch.from_numpy(start["x"]).to(torch.float64))
    witness = {
        "fedadam": lambda: torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.999), eps=1e-8),
        "fedavg": lambda: torch.optim.SGD([parameter], lr=rate),
        "fedavgm": lambda: torch.optim.SGD([parameter], lr=rate, momentum=0.9),
    }[kind]()
    ours, optimizer = dict(start), ServerOptimizer(kind, rate)
    for _ in range(12):
        mean = rng.normal(size=(5, 3)) * 0.01
        ours = optimizer.step(ours, {"x": mean})
        parameter.grad = -torch.from_numpy(mean)
        witness.step()
    assert ours["x"].dtype == np.float32
    np.testing.assert_allclose(ours["x"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fedadam", "fedavg", "fedavgm"])
def test_an_optimizer_goes_on_from_its_state(kind):
    rng = np.random.default_rng(5)
    means = [{"x": rng.normal(size=4)} for _ in range(6)]
    whole, first, second = (ServerOptimizer(kind, 0.1) for _ in range(3))
    straight = split = {"x": np.zeros(4, np.float32)}
    for mean in means:
        straight = whole.step(straight, mean)
    for mean in means[:3]:
        split = first.step(split, mean)
    second.restore(first.state())
    for mean in means[3:]:
        split = second.step(split, mean)
    np.testing.assert_array_equal(straight["x"], split["x"])


def test_the_rate_falls_as_its_schedule_says():
    mean, zero = {"x": np.ones(1)}, {"x": np.zeros(1, np.float32)}
    moved = {
        schedule: [
            float(ServerOptimizer("fedavg", 1.0, schedule).step(zero, mean, p)["x"][0]) for p in (0.0, 0.5, 0.75)
        ]
        for schedule in ("constant", "linear", "cosine")
    }
    assert moved["constant"] == [1.0, 1.0, 1.0]
    assert moved["linear"] == [1.0, 0.5, 0.25]
    assert moved["cosine"] == pytest.approx([1.0, 0.5, 0.1464466], rel=1e-5)


def test_an_unknown_optimizer_or_schedule_is_refused():
    with pytest.raises(InvalidInput, match="fedadam"):
        ServerOptimizer("lion", 0.1)
    with pytest.raises(InvalidInput, match="cosine"):
        ServerOptimizer("fedavg", 0.1, "warm")
