import json
from pathlib import Path

import pytest

from common.privacy import SampledGaussian

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["vectors"]


def by_mechanism(*names):
    """The stored vectors of these mechanisms, as pytest parameters."""
    return [pytest.param(vector, id=vector["id"]) for vector in VECTORS if vector["mechanism"] in names]


def events_of(vector):
    """The events of a stored vector, whose rounds are [sample rate, noise multiplier, steps]."""
    return [SampledGaussian(sigma, q, steps) for q, sigma, steps in vector["rounds"]]


def pytest_generate_tests(metafunc):
    for name, mechanisms in {
        "vector": ("poisson_gaussian", "gaussian"),
        "calibration_vector": ("calibration",),
        "gdp_vector": ("gdp_budget",),
        "rounds_vector": ("budget_rounds",),
    }.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, by_mechanism(*mechanisms))


@pytest.fixture(scope="session")
def vector_events():
    return events_of
