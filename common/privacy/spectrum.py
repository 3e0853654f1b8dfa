"""Spectra of tilted loss grids, and the shared store that keeps them.

A loss distribution p on the grid is multiplied by e^(θ·loss) and normalised before it is transformed. The
composition of the tilted distributions, tilted back, is the composition itself; but its floating error is now
relative to the probabilities near the ε that is asked for, not to 1, which is what makes δ = 1e-10 possible.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from common.privacy.discretise import ULP, LossGrid, log_sum_exp
from common.privacy.grids import Grid

Complex = NDArray[np.complex128]
CACHE_BYTES: Final = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One step's transform in both directions (index 0 is P‖Q, index 1 is Q‖P).

    Attributes:
        values: transforms of the tilted, normalised distributions, shape [directions, N/2 + 1].
        log_norm: log Σ p e^(θ·loss), the normalising constants; shape [directions].
        log_tail: log Σ p e^(λ·loss) at the grid's Chernoff order; shape [directions].
        infinite: probability of infinite loss; shape [directions].
        moved: bound on the probability moved by truncation.
        slack: bound on the relative rounding error of the probabilities.
    """

    values: Complex
    log_norm: NDArray[np.float64]
    log_tail: NDArray[np.float64]
    infinite: NDArray[np.float64]
    moved: float
    slack: float

    @property
    def nbytes(self) -> int:
        """Return the memory held by the transforms."""
        return int(self.values.nbytes)


def transform(losses: LossGrid, grid: Grid, directions: int) -> Spectrum:
    """Tilt, normalise and transform ``losses``, in one direction (enough for a symmetric pair) or both."""
    index = losses.low + np.arange(len(losses.mass))
    with np.errstate(divide="ignore"):
        log_mass = np.log(losses.mass)
    circular = np.zeros((directions, grid.size))
    log_norm, log_tail = np.zeros(directions), np.zeros(directions)
    largest = 0.0
    for d in range(directions):
        sign = 1 - 2 * d
        loss = sign * index * losses.spacing
        log_p = log_mass + loss if d == 0 else log_mass
        tilted = log_p + grid.tilt[d] * loss
        p = np.exp(tilted - tilted.max())
        log_norm[d] = math.log(p.sum()) + tilted.max()
        log_tail[d] = log_sum_exp(log_p + grid.order * loss)
        circular[d] = np.bincount((sign * index) % grid.size, p / p.sum(), grid.size)
        largest = max(largest, float(np.max(np.abs(tilted[p > 0]))), float(np.max(np.abs(loss))) * (grid.order + 1))
    infinite = np.array([losses.infinite_remove, losses.infinite_add])[:directions]
    return Spectrum(fft.rfft(circular), log_norm, log_tail, infinite, losses.moved, 16 * ULP * (1 + largest))


def power(values: Complex, exponent: int) -> Complex:
    """Return ``values ** exponent`` by repeated squaring: relative error at most 2.3 * exponent ulp."""
    result: Complex | None = None
    while True:
        if exponent & 1:
            result = values if result is None else result * values
        exponent >>= 1
        if not exponent:
            assert result is not None  # noqa: S101 - the highest bit of a positive exponent is set
            return result
        values = values * values


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Item = TypeVar("_Item", bound=_Sized)


class Store(Generic[_Item]):
    """Least recently used items up to a number of bytes; safe to share between threads and clients."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Hashable, _Item] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], _Item]) -> _Item:
        """Return the item under ``key``, made (outside the lock) and kept if it was not there."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        item = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = item
                self._bytes += item.nbytes
            while self._bytes > self._capacity and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.nbytes
        return item
