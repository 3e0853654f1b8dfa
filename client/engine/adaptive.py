"""Adaptive clipping with its charged release.

After Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially private learning with adaptive clipping". The threshold
follows a quantile of the gradient norms: C ← C·exp(−η(b̃ − γ)), inside a public range, where b̃ is the noised fraction of
*unclipped* records, bits centred so that one record moves the count by ½. b̃ and C stay in the organisation.

>>> rule = AdaptiveClipping(quantile=0.5, learning_rate=0.2, lower=0.01, upper=10.0, count_noise=10.0)
>>> round(rule.gradient_noise_multiplier(1.0), 5)   # slightly more noise on the gradient pays for the count
1.00125
>>> rule.next(1.0, unclipped_fraction=1.0) < 1.0    # everything fits under C: lower it
True
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from common.errors import InvalidInput
from common.privacy.clipping import sum_noise_multiplier


@dataclass(frozen=True)
class AdaptiveClipping:
    """The public settings of adaptive clipping.

    Attributes:
        quantile: γ, the fraction of records that should stay unclipped.
        learning_rate: η of the geometric update.
        lower, upper: the public range of C.
        count_noise: σ_b, standard deviation of the noise on the count, in records.
    """

    quantile: float
    learning_rate: float
    lower: float
    upper: float
    count_noise: float

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise InvalidInput(f"quantile must be in (0, 1), got {self.quantile}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise InvalidInput(f"learning_rate of the clipping norm must be > 0, got {self.learning_rate}")
        if not 0.0 < self.lower <= self.upper < float("inf"):
            raise InvalidInput(
                f"the range of the clipping norm must be 0 < lower <= upper, got {self.lower}, {self.upper}"
            )
        if not 0.0 < self.count_noise < float("inf"):
            raise InvalidInput(f"count_noise must be > 0, got {self.count_noise}")

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """z_Δ = (z⁻² − (2σ_b)⁻²)^(−½): gradient and count together then cost one Gaussian of multiplier z.

        Raises:
            InvalidInput: z ≥ 2σ_b: the count alone would cost more than the whole step may.
        """
        try:
            return sum_noise_multiplier(noise_multiplier, count_noise_std=self.count_noise)
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    def next(self, clipping_norm: float, unclipped_fraction: float) -> float:
        """The next step's C from the noised fraction b̃ of unclipped records; b̃ outside [0, 1] is used as it is."""
        exponent = -self.learning_rate * (unclipped_fraction - self.quantile)
        moved = clipping_norm * exp(max(-50.0, min(50.0, exponent)))
        return min(self.upper, max(self.lower, moved))
