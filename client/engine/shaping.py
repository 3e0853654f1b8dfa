"""Noise shaped per module from what was already released: opt-in, off by default.

Under clipping |S⁻¹g| ≤ C with noise S·N(0, σ²C²) the noise-minimising S grows like (E g²)^(1/4). Here E g² is estimated
per parameter tensor from the organisation's own *noised* gradients, less the known noise variance. So S is a function
of outputs that were charged, and a step with it costs what any step of its σ costs (DESIGN §4.4). It helps where
modules differ in scale and can hurt by about 2 % where they do not, which is why nobody gets it without asking.

The organisation's own releases may be used when it alone adds its noise; where noise is shared between organisations S
must come from the aggregate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from client.engine.clipping import ShapedClipping
from client.engine.layout import Layout
from common.errors import InvalidInput


@dataclass
class ModuleShaper:
    """Turns released gradients into the next step's shaping.

    Guarantee: it reads nothing but released vectors and the public standard deviation of their noise.

    Attributes:
        layout: names and places of the parameters.
        memory: weight β of the past in the moving average, in [0, 1).
        widest: largest ratio between two scales, at most 1e3.
    """

    layout: Layout
    memory: float = 0.9
    widest: float = 30.0
    _signal: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _doubt: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0 or not 1.0 <= self.widest <= 1e3:
            raise InvalidInput(f"memory must be in [0, 1) and widest in [1, 1000], got {self.memory}, {self.widest}")

    def observe(self, released: np.ndarray, noise_std: float | np.ndarray) -> None:
        """Take one released gradient [P] and the standard deviation of the noise in it (a number, or [P])."""
        std = np.broadcast_to(np.asarray(noise_std, dtype=np.float64), released.shape)
        self._steps += 1
        for name, slot in self.layout.slots.items():
            part = slice(slot.offset, slot.offset + slot.size)
            variance = float(np.mean(std[part] ** 2))
            surplus = float(np.mean(released[part].astype(np.float64) ** 2)) - variance
            # The mean of d squares of noise with variance v has the standard error v·√(2/d).
            error = variance * sqrt(2.0 / slot.size)
            self._signal[name] = self._moved(self._signal.get(name, 0.0), surplus)
            self._doubt[name] = self._moved(self._doubt.get(name, 0.0), error)

    def rule(self, clipping_norm: float) -> ShapedClipping:
        """The next step's clipping: S from what was observed, all ones before anything was.

        S is normalised so that the total noise variance is that of unshaped noise of the same σ and C.
        """
        if not self._steps:
            return ShapedClipping(clipping_norm, dict.fromkeys(self.layout.slots, 1.0))
        settled = 1.0 - self.memory**self._steps
        seen = min(self._steps, (1.0 + self.memory) / (1.0 - self.memory))
        # Where noise hides the signal, two standard errors stand in for it: no module is starved on a guess.
        squares = {
            name: max(self._signal[name] / settled, 2.0 * self._doubt[name] / settled / sqrt(seen))
            for name in self._signal
        }
        return ShapedClipping(clipping_norm, self._normalised({name: value**0.25 for name, value in squares.items()}))

    def forget(self) -> None:
        """Delete what was observed, at the end of a run."""
        self._signal.clear()
        self._doubt.clear()
        self._steps = 0

    def _moved(self, old: float, new: float) -> float:
        return self.memory * old + (1.0 - self.memory) * new

    def _normalised(self, scales: Mapping[str, float]) -> dict[str, float]:
        top = max(scales.values())
        bounded = {name: max(scale, top / self.widest) for name, scale in scales.items()}
        power = sum(self.layout.slots[name].size * scale**2 for name, scale in bounded.items())
        unit = sqrt(self.layout.num_parameters / power)
        return {name: scale * unit for name, scale in bounded.items()}
