"""Poisson sampling: every record is drawn on its own, with the same public probability, afresh for every step.

>>> import numpy as np
>>> PoissonSampler(sample_rate=0.5).draw(6, np.random.default_rng(1))
array([2, 4, 5])

Formal guarantee: each of the ``num_records`` indices is in the draw with probability exactly ``sample_rate`` (for rates
of at least 2^-53, given uniform random bits), independently of all others and of earlier draws. This is the sampler
that the accountants of this package charge for; a shuffled loader is not (Annamalai et al. 2024; Chua et al. 2024).

The rate is public, so it is a field. The number of records is private and the generator secret, so both are
arguments; the length of the draw is private too and must leave nowhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.privacy.checks import rate

_UNIT = 2.0**53


@dataclass(frozen=True)
class PoissonSampler:
    """Draws each record with probability ``sample_rate``; 1 draws all of them.

    Attributes:
        sample_rate: q in (0, 1]; public.

    Raises:
        ValueError: the rate is outside (0, 1].
    """

    sample_rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", rate(sample_rate=self.sample_rate))

    def draw(self, num_records: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the indices drawn for one step, ascending and without repetition; possibly none.

        A uniform number of 53 bits lies below floor(q 2^53) / 2^53 with just that probability; where it equals that
        bound, a second number decides over the fraction that is left. Rounding therefore does not change q.

        Args:
            num_records: how many records there really are; private, hence an argument.
            rng: the generator, from a cryptographic source wherever privacy is claimed.

        Raises:
            ValueError: ``num_records`` is negative.
        """
        if num_records < 0:
            raise ValueError(f"num_records must be >= 0, got {num_records}")
        whole = math.floor(self.sample_rate * _UNIT)
        uniform = rng.random(num_records) * _UNIT
        drawn = uniform < whole
        undecided = np.flatnonzero(uniform == whole)
        if undecided.size:
            drawn[undecided] = rng.random(undecided.size) < self.sample_rate * _UNIT - whole
        return np.flatnonzero(drawn).astype(np.int64)
