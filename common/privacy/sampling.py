"""Poisson sampling: every record is drawn on its own, with the same public probability, afresh for every step.

>>> import numpy as np
>>> PoissonSampler(sample_rate=0.5).draw(6, np.random.default_rng(1))
array([2, 3, 5])

Formal guarantee: each of the ``num_records`` indices is in the draw with probability exactly ``sample_rate`` (to the
53 bits of a double), independently of all others and of earlier draws. This is the sampler that the accountants of
this package charge for; a shuffled loader is not (Annamalai et al. 2024; Chua et al. 2024).

The rate is public, so it is a field. The number of records is private and the generator secret, so both are
arguments; the length of the draw is private too and must leave nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.privacy.checks import rate


@dataclass(frozen=True)
class PoissonSampler:
    """Draws each record with probability ``sample_rate``; 1 draws all of them.

    Raises:
        ValueError: the rate is outside (0, 1].
    """

    sample_rate: float

    def __post_init__(self) -> None:
        rate(sample_rate=self.sample_rate)

    def draw(self, num_records: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The indices drawn for one step, ascending; possibly none.

        Args:
            num_records: how many records there really are. Private.
            rng: from a cryptographic generator wherever privacy is claimed.
        """
        if num_records < 0:
            raise ValueError(f"num_records must be >= 0, got {num_records}")
        return np.flatnonzero(rng.random(num_records) < self.sample_rate).astype(np.int64)
