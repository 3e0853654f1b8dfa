"""Averages of updates with public weights, one update at a time, and the server's optimizers on that average.

Memory does not grow with the number of clients: an update is added and forgotten. Weights are constants of the run's
terms; a client's own count never enters (it would be private and unbounded).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InvalidInput
from common.messages import Arrays
from server.schedules import RATES, rate_factor

Doubles = dict[str, npt.NDArray[np.float64]]


class WeightedMean:
    """The running weighted mean of updates, summed in float64.

    The caller adds in the order of client names, so that a run gives the same bytes on every backend.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._sum: Doubles = {name: np.zeros(shape) for name, shape in shapes.items()}
        self._variance = dict.fromkeys(shapes, 0.0)
        self._weight = 0.0
        self.count = 0

    def add(self, update: Arrays, weight: float, noise_std: Mapping[str, float] | None = None) -> None:
        """Add one update, and the public standard deviation of the noise in each of its tensors, where it is known.

        Raises:
            InvalidInput: a name, a shape or a value (not finite) is wrong; nothing was added.
        """
        check_update(update, self._shapes)
        for name, array in update.items():
            self._sum[name] += weight * array.astype(np.float64)
            self._variance[name] += (weight * (noise_std or {}).get(name, 0.0)) ** 2
        self._weight += weight
        self.count += 1

    def mean(self) -> Doubles:
        """The weighted mean of what was added; at least one update is needed."""
        if self.count == 0:
            raise InvalidInput("no update was added, so there is no mean")
        return {name: total / self._weight for name, total in self._sum.items()}

    def noise_std(self) -> dict[str, float]:
        """Standard deviation of the noise in each tensor of the mean; 0 where it is not known."""
        return {name: math.sqrt(one) / self._weight for name, one in self._variance.items()}


def check_update(update: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``InvalidInput`` unless ``update`` has exactly these tensors, float32 and finite."""
    if update.keys() != shapes.keys():
        odd = sorted(update.keys() ^ shapes.keys())[0]
        raise InvalidInput(f"the update does not fit the adapter: {odd} is on one side only")
    for name, array in update.items():
        if array.shape != tuple(shapes[name]):
            raise InvalidInput(f"{name}: shape {array.shape}, the adapter has {tuple(shapes[name])}")
        if array.dtype != np.float32:
            raise InvalidInput(f"{name}: dtype {array.dtype}, float32 is needed")
        if not np.isfinite(array).all():
            raise InvalidInput(f"{name}: holds values that are not finite")


class ServerOptimizer:
    """Applies the mean update to the adapter (Reddi et al. 2021, Algorithm 2, with the update as pseudo-gradient).

    ``fedavg`` adds ``learning_rate`` times the mean; ``fedavgm`` keeps a momentum of 0.9; ``fedadam`` is Adam with
    bias correction (β 0.9 and 0.999). All of it is post-processing of noised updates and costs no privacy. A tensor
    that rests in a round (``rolora``) keeps its place and its moments.
    """

    BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8

    def __init__(self, kind: str, learning_rate: float, schedule: str = "constant") -> None:
        if kind not in {"fedavg", "fedavgm", "fedadam"}:
            raise InvalidInput(f"server-optimizer {kind!r}: use fedavg, fedavgm or fedadam")
        if schedule not in RATES:
            raise InvalidInput(f"server-schedule {schedule!r}: use {', '.join(RATES)}")
        self._kind = kind
        self._rate = learning_rate
        self._schedule = schedule
        self._steps: dict[str, int] = {}
        self._first: Doubles = {}
        self._second: Doubles = {}

    def step(
        self, adapter: Arrays, mean: Doubles, progress: float = 0.0, *, active: Collection[str] | None = None
    ) -> Arrays:
        """The next adapter, float32.

        Args:
            adapter: the current one.
            mean: the averaged update.
            progress: the share of the run's rounds that lie behind, in [0, 1).
            active: the tensors that move; None for all.
        """
        rate = self._rate * rate_factor(self._schedule, progress)
        return {
            name: self._moved(name, array, mean[name], rate) if active is None or name in active else array
            for name, array in adapter.items()
        }

    def _moved(
        self, name: str, array: npt.NDArray[np.float32], update: npt.NDArray[np.float64], rate: float
    ) -> npt.NDArray[np.float32]:
        self._steps[name] = self._steps.get(name, 0) + 1
        with np.errstate(over="ignore"):  # the round loop looks whether the result is finite
            return (array.astype(np.float64) + rate * self._direction(name, update)).astype(np.float32)

    def _direction(self, name: str, update: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self._kind == "fedavg":
            return update
        first = self._first.get(name, np.zeros_like(update))
        if self._kind == "fedavgm":
            self._first[name] = self.BETA_1 * first + update
            return self._first[name]
        second = self._second.get(name, np.zeros_like(update))
        self._first[name] = first = self.BETA_1 * first + (1 - self.BETA_1) * update
        self._second[name] = second = self.BETA_2 * second + (1 - self.BETA_2) * update**2
        corrected = first / (1 - self.BETA_1 ** self._steps[name])
        scale = np.sqrt(second / (1 - self.BETA_2 ** self._steps[name])) + self.TINY
        return np.asarray(corrected / scale, dtype=np.float64)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays for the checkpoint."""
        arrays: dict[str, npt.NDArray[Any]] = {f"steps/{name}": np.asarray(n) for name, n in self._steps.items()}
        arrays |= {f"first/{name}": array for name, array in self._first.items()}
        arrays |= {f"second/{name}": array for name, array in self._second.items()}
        return arrays

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what ``state`` gave."""
        self._steps = {name[6:]: int(count) for name, count in arrays.items() if name.startswith("steps/")}
        self._first = {name[6:]: array for name, array in arrays.items() if name.startswith("first/")}
        self._second = {name[7:]: array for name, array in arrays.items() if name.startswith("second/")}
