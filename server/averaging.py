"""Averages of the adapters that a run went through: post-processing of what was released, so it costs no privacy.

Noise moves the last iterate about; the mean of many iterates holds less of it (Polyak and Juditsky 1992). Training goes
on from the raw iterate. What is scored, saved and certified is the average.

>>> average = TailAverage("tail", rounds=4)
>>> for server_round, value in enumerate([1.0, 2.0, 3.0, 5.0], start=1):
...     average.add(server_round, {"x": np.array([value], np.float32)})
>>> average.released({"x": np.array([5.0], np.float32)})["x"]
array([4.], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InvalidInput
from common.messages import Arrays

KINDS = ("none", "tail")


class TailAverage:
    """The uniform mean of the adapters after the last half of the rounds: after every round t > rounds/2.

    Args:
        kind: ``none`` releases each round's adapter as it is. rounds: of the whole run, public.
    """

    def __init__(self, kind: str, rounds: int) -> None:
        if kind not in KINDS:
            raise InvalidInput(f"averaging {kind!r}: use {' or '.join(KINDS)}")
        self._from = rounds // 2 + 1 if kind == "tail" else None
        self._sum: dict[str, npt.NDArray[np.float64]] = {}
        self._count = 0

    def add(self, server_round: int, adapter: Arrays) -> None:
        """Take the adapter after ``server_round`` (from 1), if that round belongs to the tail."""
        if self._from is None or server_round < self._from:
            return
        for name, array in adapter.items():
            held = self._sum.get(name)
            self._sum[name] = array.astype(np.float64) if held is None else held + array
        self._count += 1

    def released(self, adapter: Arrays) -> Arrays:
        """The average, float32; ``adapter`` itself (the newest) before the tail begins, or without averaging."""
        if not self._count:
            return adapter
        return {name: (self._sum[name] / self._count).astype(np.float32) for name in adapter}

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays for the checkpoint; empty before the tail begins."""
        if not self._count:
            return {}
        return {"count": np.asarray(self._count)} | {f"sum/{name}": array for name, array in self._sum.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what ``state`` gave."""
        self._count = int(arrays["count"]) if arrays else 0
        self._sum = {name[4:]: array for name, array in arrays.items() if name.startswith("sum/")}
