r"""What adaptive clipping costs: the noised count of unclipped records is a release of its own.

Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially private learning with adaptive clipping", §3. In a step with
noise multiplier z for everything, the sum is noised with multiplier z_Δ and the count of unclipped records, with bits
centred at ±1/2 so that one record moves it by at most 1/2, with a std of σ_b records. Whitened, the pair is one
Gaussian of multiplier z when

    z^-2 = z_Δ^-2 + (2 σ_b)^-2.

(Bits in {0, 1} would move the count by 1: a claimed ε of 4.38 is then truly 6.07.) The threshold must not change
within a step, and may depend on released counts only.

>>> round(sum_noise_multiplier(1.0, count_noise_std=10.0), 6)
1.001252
"""

from __future__ import annotations

import math

from common.privacy import checks


def sum_noise_multiplier(noise_multiplier: float, *, count_noise_std: float) -> float:
    """Return z_Δ, the multiplier for the sum so that sum and count cost ``noise_multiplier`` together; rounded up.

    Args:
        noise_multiplier: z, what the step is charged at.
        count_noise_std: σ_b, noise on the centred count, in records.

    Raises:
        ValueError: if z >= 2σ_b: the count alone would cost more than the step is charged for.
    """
    z, noise = checks.positive(noise_multiplier=noise_multiplier), checks.positive(count_noise_std=count_noise_std)
    if z >= 2 * noise:
        raise ValueError(f"count_noise_std must be above noise_multiplier / 2 = {z / 2:g}, got {noise!r}")
    ratio = z / (2 * noise)
    return z / math.sqrt((1 - ratio) * (1 + ratio)) * (1 + 1e-15)


def charged_noise_multiplier(sum_noise: float, *, count_noise_std: float) -> float:
    """Return z, what to charge for a sum noised with z_Δ = ``sum_noise`` and a count with σ_b; rounded down."""
    z, noise = checks.positive(sum_noise=sum_noise), checks.positive(count_noise_std=count_noise_std)
    return 1 / math.hypot(1 / z, 1 / (2 * noise)) * (1 - 1e-15)
