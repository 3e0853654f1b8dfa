import numpy as np
import pytest
from scipy.stats import binomtest

from common.privacy.sampling import PoissonSampler


def test_indices_are_sorted_distinct_and_in_range():
    drawn = PoissonSampler(0.3).draw(1000, np.random.default_rng(0))
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert drawn[0] >= 0
    assert drawn[-1] < 1000


@pytest.mark.parametrize("q", [1e-3, 0.1, 0.5, 0.999])
def test_each_record_is_drawn_with_the_planned_rate(q):
    rng = np.random.default_rng(7)
    drawn = len(PoissonSampler(q).draw(400_000, rng))
    assert binomtest(drawn, 400_000, q).pvalue > 1e-4


def test_records_and_steps_are_independent():
    rng, sampler = np.random.default_rng(3), PoissonSampler(0.5)
    taken = np.zeros((4000, 4), dtype=bool)
    for row in taken:
        row[sampler.draw(4, rng)] = True
    correlation = np.corrcoef(taken.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.08
    sizes = taken.sum(axis=1)
    assert np.var(sizes) == pytest.approx(4 * 0.25, rel=0.1)  # binomial: the number drawn varies


def test_rate_one_takes_all_and_nothing_comes_of_nothing():
    rng = np.random.default_rng(0)
    assert PoissonSampler(1).draw(5, rng).tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(0.5).draw(0, rng).tolist() == []
    with pytest.raises(ValueError, match="num_records must be >= 0"):
        PoissonSampler(0.5).draw(-1, rng)


@pytest.mark.parametrize("q", [0, -0.1, 1.5, float("nan")])
def test_a_bad_rate_is_refused(q):
    with pytest.raises(ValueError, match="sample_rate must be in"):
        PoissonSampler(q)


class Scripted:
    """A generator that returns what it is told, to reach the tie."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def random(self, size):
        return np.asarray(self.answers.pop(0), dtype=float)[:size]


def test_a_tie_with_the_rate_is_decided_by_the_fraction_that_is_left():
    q = 0.3 * 2.0**-53 + 2.0**-50  # lies between two neighbours of the 53-bit grid
    whole = 2.0**-50
    assert PoissonSampler(q).draw(2, Scripted([whole, 1.0 - 2**-53], [0.2])).tolist() == [0]
    assert PoissonSampler(q).draw(2, Scripted([whole, 1.0 - 2**-53], [0.4])).tolist() == []
    assert PoissonSampler(q).draw(1, Scripted([whole - 2**-53])).tolist() == [0]
