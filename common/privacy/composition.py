"""The multiset of steps behind a PLD accountant: its moments, its grid and its product of spectra.

A composition is a value. Extending it keeps a reference to what its ancestor had multiplied, so one more
round costs one spectrum and one product; spectra are shared by all compositions of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.privacy import checks, gdp, grids
from common.privacy.checks import TooLarge
from common.privacy.discretise import LADDER, LossGrid, discretise, log_moments
from common.privacy.events import SampledGaussian
from common.privacy.grids import Grid, Window
from common.privacy.pairs import Array, dominating_pair
from common.privacy.spectrum import CACHE_BYTES, Complex, Spectrum, Store, power, transform

Key = tuple[float, float]  # noise multiplier, sample rate

_MOST_STEPS: Final = 10**9
_STRONGEST: Final = 20.0  # largest sensitivity over noise of one step: beyond, e^loss leaves the doubles
_WIDEST: Final = 12.0  # standard deviations resolved when moments are taken
_SCALE: Final = float(2**60)  # moments are kept as integers in units of 2^-60, so that their sums are exact


@dataclass(frozen=True, slots=True)
class _Moments:
    """log E[e^(λ·loss)] of one step on the ladder, as Python integers in units of 2^-60; shape [2, len(LADDER)]."""

    scaled: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return 64 * int(self.scaled.size)


@dataclass(frozen=True, slots=True)
class Product:
    """The spectra of ``steps`` steps multiplied on one grid, with what goes into the bound (see ``Spectrum``)."""

    values: Complex
    log_norm: Array
    log_tail: Array
    infinite: Array
    moved: float
    slack: float
    steps: int

    def times(self, spectrum: Spectrum, steps: int) -> Product:
        """Return the product with ``steps`` more steps of one kind."""
        return Product(
            self.values * power(spectrum.values, steps),
            self.log_norm + steps * spectrum.log_norm,
            self.log_tail + steps * spectrum.log_tail,
            self.infinite + steps * spectrum.infinite,
            self.moved + steps * spectrum.moved,
            self.slack + steps * spectrum.slack,
            self.steps + steps,
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    value: float
    nbytes: int


class Caches:
    """What all compositions of a process share."""

    def __init__(self, capacity: int) -> None:
        self.moments: Store[_Moments] = Store(capacity // 8)
        self.losses: Store[LossGrid] = Store(capacity // 4)
        self.spectra: Store[Spectrum] = Store(capacity)
        self.answers: Store[_Answer] = Store(capacity // 6)


_shared = Caches(CACHE_BYTES)


def clear_caches() -> None:
    """Forget all shared spectra (for measurements that must start cold)."""
    global _shared
    _shared = Caches(CACHE_BYTES)


class Composition:
    """The steps taken so far, under one relation.

    Attributes:
        relation: neighbouring relation.
        events: what was composed, in order.
        counts: steps per (noise multiplier, sample rate): the multiset that fixes every answer.
        steps: all steps together.
    """

    __slots__ = ("_moments", "_products", "counts", "events", "relation", "steps")

    def __init__(self, relation: checks.Relation) -> None:
        self.relation = relation
        self.events: tuple[SampledGaussian, ...] = ()
        self.counts: Mapping[Key, int] = {}
        self.steps = 0
        # What this composition or an ancestor has worked out, each with the number of events it covers.
        self._moments: tuple[int, NDArray[Any]] = (0, np.zeros((2, len(LADDER)), dtype=object))
        self._products: dict[Grid, tuple[int, Product]] = {}

    def extended(self, added: tuple[SampledGaussian, ...]) -> Composition:
        """Return the composition with ``added`` on top."""
        child = Composition(self.relation)
        child.events = self.events + added
        child.counts = _counted(added, self.counts)
        child.steps = self.steps + sum(event.steps for event in added)
        if child.steps > _MOST_STEPS:
            raise TooLarge(f"steps must be at most {_MOST_STEPS} in all to be computed soundly, got {child.steps}")
        child._moments, child._products = self._moments, dict(self._products)
        return child

    def answer(self, what: str, argument: float, compute: Callable[[float], float]) -> float:
        """Return ``compute(argument)``, or what the same multiset of steps was answered before in this process."""
        key = (what, argument, self.relation, frozenset(self.counts.items()))
        return _shared.answers.get(key, lambda: _Answer(compute(argument), 200 * (1 + len(self.counts)))).value

    @property
    def directions(self) -> int:
        """1 where the dominating pairs are symmetric, else 2."""
        return 1 if self.relation == "replace_one" else 2

    def gaussian_mu(self) -> float:
        """Return μ of all unsampled steps together (0 when there is none), the same in any order."""
        shift = gdp.sensitivity(self.relation)
        return math.sqrt(math.fsum(n * (shift / s) ** 2 for (s, q), n in self.counts.items() if q == 1))

    def only_gaussian(self) -> bool:
        """Return whether every step is unsampled: then the composition is exactly one Gaussian."""
        return all(q == 1 for _, q in self.counts)

    def window_at(self, epsilon: float) -> tuple[Window, float]:
        """Choose the grid to evaluate δ on, and where: at ``epsilon``, or before it where δ has long vanished."""
        moments = self._composed_moments()
        at = min(epsilon, grids.furthest(moments))
        return self.window(grids.rough_delta(moments, at), reach=at), at

    def window(self, delta: float, spacing: float = math.inf, reach: float = 0.0) -> Window:
        """Choose the grid for a query near ``delta``, no coarser than ``spacing`` and resolving losses to ``reach``."""
        distinct = [n for (_, q), n in self.counts.items() if q < 1]
        if len(distinct) < len(self.counts):
            distinct.append(1)  # the merged Gaussian
        return grids.choose(self._composed_moments(), sum(distinct), len(distinct), delta, spacing, reach)

    def _composed_moments(self) -> Array:
        """Return log E[e^(λ·loss)] of everything composed, on the ladder; shape [directions, len(LADDER)]."""
        covered, moments = self._moments
        for key, steps in sorted(_counted(self.events[covered:]).items()):
            moments = moments + steps * _step_moments(key, self.relation)
        self._moments = (len(self.events), moments)
        gaussian = self.gaussian_mu() ** 2 * LADDER * (LADDER + 1) / 2
        return np.asarray(moments[: self.directions].astype(float) / _SCALE + gaussian)

    def product(self, grid: Grid) -> Product:
        """Return the product of all spectra on ``grid``, the unsampled steps merged into one Gaussian."""
        covered, product = self._products.get(grid, (0, _unit(grid, self.directions)))
        for key, steps in sorted(_counted(self.events[covered:]).items()):
            if key[1] < 1:
                product = product.times(_step_spectrum(key, self.relation, grid), steps)
        others = [item for item in self._products.items() if item[0] != grid]
        self._products = {**dict(others[-1:]), grid: (len(self.events), product)}
        mu = self.gaussian_mu() * (1 + 1e-15)
        if not mu:
            return product
        if mu > _STRONGEST:
            raise TooLarge(
                f"unsampled steps mixed with sampled ones must amount to μ of at most {_STRONGEST:g} to be computed "
                f"soundly, got {mu:g}"
            )
        return product.times(_spectrum((1 / mu, 1.0), "add_remove", grid, self.directions), 1)


def _counted(events: Iterable[SampledGaussian], start: Mapping[Key, int] | None = None) -> dict[Key, int]:
    """Return the number of steps of each kind."""
    counts = dict(start or {})
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        counts[key] = counts.get(key, 0) + event.steps
    return counts


def _unit(grid: Grid, directions: int) -> Product:
    """Return the product of nothing."""
    zero = np.zeros(directions)
    return Product(np.ones((directions, grid.size // 2 + 1), complex), zero, zero, zero, 0.0, 0.0, 0)


def _refuse_strong(key: Key, relation: checks.Relation) -> None:
    shift = gdp.sensitivity(relation)
    if shift / key[0] > _STRONGEST:
        raise TooLarge(
            f"noise_multiplier must be at least {shift / _STRONGEST:g} under {relation} for a sampled event "
            f"to be computed soundly, got {key[0]!r}"
        )


def _step_moments(key: Key, relation: checks.Relation) -> NDArray[Any]:
    """Return the moments of one step on the ladder as integers; zero for an unsampled step (see ``gaussian_mu``)."""
    if key[1] == 1:
        return np.zeros((2, len(LADDER)), dtype=object)
    _refuse_strong(key, relation)
    cost = "replace_one" if relation == "replace_one" else "add_remove"

    def make() -> _Moments:
        values = np.stack(log_moments(dominating_pair(*key, relation), _WIDEST))
        return _Moments(np.array([[int(v) for v in row] for row in np.rint(values * _SCALE)], dtype=object))

    return _shared.moments.get((key, cost), make).scaled


def _step_spectrum(key: Key, relation: checks.Relation, grid: Grid) -> Spectrum:
    """Return the spectrum of one step on ``grid``, from the shared store."""
    cost: checks.Relation = "replace_one" if relation == "replace_one" else "add_remove"
    return _spectrum(key, cost, grid, 1 if cost == "replace_one" else 2)


def _spectrum(key: Key, cost: checks.Relation, grid: Grid, directions: int) -> Spectrum:
    def losses() -> LossGrid:
        pair = dominating_pair(*key, cost)
        return discretise(pair, grid.spacing, cap=grid.cap, width=grid.width)

    def make() -> Spectrum:
        held = _shared.losses.get((key, cost, grid.spacing, grid.cap, grid.width), losses)
        return transform(held, grid, directions)

    return _shared.spectra.get((key, cost, grid, directions), make)
