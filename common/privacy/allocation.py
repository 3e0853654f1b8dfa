r"""Noise that differs between groups of coordinates: what it costs, and the cheapest split.

A Gaussian with covariance Σ hides a shift Δ as well as one coordinate hides sup |Σ^(-1/2) Δ| (whiten both). If each
record's contribution is clipped *in the scaled norm*, |S^-1 g| <= C, and the noise is S N(0, σ²C² I), that is exactly a
Gaussian of multiplier σ, whatever S is. S may follow released outputs, but not the raw data; it is fixed within a
step and its condition number is bounded, so that scaling loses no precision.

Groups of coordinates with clips C_g and noise stds s_g amount to one multiplier: 1/σ² = Σ_g (C_g/s_g)².

*Not* sound is the reading of "importance-weighted noise" in which an ordinary clip |g| <= C meets noise σ C m_j with
weights of mean 1: the worst record lies along the smallest m_j, so the multiplier is σ·min m_j (a claimed ε of 4.38
is truly 6.7 to 23.7 for weights that differ by a factor 2 to 10). :func:`weighted_noise_multiplier` charges that
minimum.

>>> round(group_noise_multiplier([1.0, 1.0], [2.0, 2.0]), 4)
1.4142
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from common.privacy import checks

if TYPE_CHECKING:
    from common.privacy.pairs import Array

MAX_CONDITION: Final = 1e3
_DOWN: Final = 1 - 1e-14


def _positive(name: str, values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size or not np.all(np.isfinite(array) & (array > 0)):
        raise ValueError(f"{name} must be a non-empty list of finite numbers > 0, got {values!r}")
    return array


def _same_length(**named: Array) -> None:
    lengths = {name: len(values) for name, values in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists must have the same length, got {lengths}")


def group_noise_multiplier(clipping_norms: Sequence[float], noise_stds: Sequence[float]) -> float:
    """Return the one multiplier that groups with their own clips and noise amount to, rounded down.

    Args:
        clipping_norms: C_g, the L2 clip of each group.
        noise_stds: s_g, the noise standard deviation of each group.

    Raises:
        ValueError: for values that are not finite and > 0, or lists of different length.
    """
    clips, stds = _positive("clipping_norms", clipping_norms), _positive("noise_stds", noise_stds)
    _same_length(clipping_norms=clips, noise_stds=stds)
    return float(1 / math.sqrt(math.fsum((clips / stds) ** 2))) * _DOWN


def cheapest_noise_stds(
    noise_multiplier: float,
    clipping_norms: Sequence[float],
    sizes: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Array:
    """Return the noise stds of least weighted total variance that amount to ``noise_multiplier``.

    Minimises Σ w_g d_g s_g² subject to Σ (C_g/s_g)² = 1/σ²: s_g² = σ² C_g/sqrt(w_g d_g) · Σ_h C_h sqrt(w_h d_h)
    (Lagrange).

    Args:
        noise_multiplier: σ.
        clipping_norms: C_g.
        sizes: d_g, number of coordinates of each group.
        weights: w_g, how much a unit of variance matters there; 1 by default. Public or already released values only.

    Raises:
        ValueError: for values that are not finite and > 0, or lists of different length.
    """
    sigma, clips = checks.positive(noise_multiplier=noise_multiplier), _positive("clipping_norms", clipping_norms)
    dims = _positive("sizes", sizes)
    importance = np.ones(len(clips)) if weights is None else _positive("weights", weights)
    _same_length(clipping_norms=clips, sizes=dims, weights=importance)
    root = np.sqrt(importance * dims)
    stds = sigma * np.sqrt(clips / root * float(np.sum(clips * root)))
    return np.asarray(stds * (1 + 1e-14))


def scaled_noise_multiplier(
    noise_multiplier: float, scales: Sequence[float] | Array, *, clipped_in_scaled_norm: bool
) -> float:
    """Return the multiplier to charge for noise of std σ·C·S_j per coordinate.

    Args:
        noise_multiplier: σ.
        scales: the diagonal of S (or one value per group); public or already released values only.
        clipped_in_scaled_norm: whether each contribution was clipped as |S^-1 g| <= C. If not, the multiplier is
            charged at its smallest coordinate.

    Returns:
        σ if clipped in the scaled norm, else σ·min S.

    Raises:
        ValueError: if S is not finite and > 0, or its condition number exceeds 1e3.
    """
    sigma, diagonal = checks.positive(noise_multiplier=noise_multiplier), _positive("scales", scales)
    condition = float(diagonal.max() / diagonal.min())
    if condition > MAX_CONDITION:
        raise ValueError(f"scales must have a condition number of at most {MAX_CONDITION:g}, got {condition:g}")
    return sigma if clipped_in_scaled_norm else sigma * float(diagonal.min()) * _DOWN


def weighted_noise_multiplier(noise_multiplier: float, weights: Sequence[float] | Array) -> float:
    """Return what "importance" weights under ordinary clipping must be charged at: σ·min m_j.

    Args:
        noise_multiplier: σ, that the weights' mean was meant to keep.
        weights: m_j, the factor on the noise of each coordinate or group.
    """
    return scaled_noise_multiplier(noise_multiplier, weights, clipped_in_scaled_norm=False)
