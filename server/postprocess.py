r"""What the server may do to an averaged update before its optimizer: all of it post-processing, at no cost in privacy.

*Laplacian smoothing* (Liang, Wang, Gu, Osher, Yao 2020, arXiv 2005.00218; Osher et al.): v = (I + σL)⁻¹ u with the
periodic second difference L on the flattened tensor, by a Fourier transform. It leaves (1 + 2σ)/(1 + 4σ)^(3/2) of white
noise's energy, and of the signal what is smooth in index order. The order of a LoRA factor's entries means little, so
nothing is promised; measure it.

*Spectral shrinkage* (Gavish and Donoho 2017, "Optimal shrinkage of singular values", equation 1.7): of an m×n matrix
with noise of standard deviation τ on every entry, each singular value s = √n·τ·y becomes √n·τ·η(y) with
η(y) = √((y² − β − 1)² − 4β)/y for y > 1 + √β (β = m/n ≤ 1) and 0 below, which is best for the squared error. τ is a
public constant of the run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Double = npt.NDArray[np.float64]
Doubles = dict[str, Double]


def smoothed(mean: Mapping[str, Double], strength: float) -> Doubles:
    """Every tensor after Laplacian smoothing of ``strength`` σ; 0 leaves all as it is."""
    if strength == 0.0:
        return dict(mean)
    return {name: _smooth(array, strength) for name, array in mean.items()}


def _smooth(array: Double, strength: float) -> Double:
    flat = array.reshape(-1)
    frequencies = np.arange(flat.size // 2 + 1) / flat.size
    damping = 1 + 2 * strength * (1 - np.cos(2 * np.pi * frequencies))
    return np.asarray(np.fft.irfft(np.fft.rfft(flat) / damping, n=flat.size)).reshape(array.shape)


def shrunk(mean: Mapping[str, Double], noise_std: Mapping[str, float]) -> Doubles:
    """Every matrix with its singular values shrunk by the noise in it; vectors stay as they are.

    Args:
        mean: the averaged update.
        noise_std: τ per tensor, public.
    """
    return {
        name: _shrink(array, noise_std[name]) if array.ndim == 2 and noise_std.get(name, 0.0) > 0 else array
        for name, array in mean.items()
    }


def _shrink(matrix: Double, noise_std: float) -> Double:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rows, columns = sorted(matrix.shape)
    beta, unit = rows / columns, np.sqrt(columns) * noise_std
    y = np.maximum(values / unit, 1e-300)
    inside = np.maximum((y**2 - beta - 1) ** 2 - 4 * beta, 0.0)
    kept = np.where(y > 1 + np.sqrt(beta), np.sqrt(inside) / y, 0.0)
    return np.asarray((left * (unit * kept)) @ right)
