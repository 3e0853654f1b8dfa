"""Choice of the grid on which a composition is computed: spacing, window, tilt and orders.

Everything here only decides how tight and how fast the answer is. That the answer is an upper bound does not
depend on it (see ``pld``): a poor choice gives a larger ε, never a smaller one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtri

from common.privacy.checks import TooLarge
from common.privacy.discretise import LADDER
from common.privacy.pairs import Array

TOLERANCE: Final = 1e-4  # relative error of ε that the spacing aims at
_RESERVE: Final = math.log(1e7)  # masses set aside (tails, folding) are about 1e-7 of δ
_FEWEST: Final = 2**11  # points of a transform that cost next to nothing
_MOST: Final = 2**21
FAINTEST: Final = 1e-18  # a δ below this is answered by this one's ε
_MOST_WORK: Final = 2**25  # points of all distinct transforms together: about 10 s and 2 GiB at the peak
_COARSEST: Final = 0.02  # a predicted relative error of ε above this is refused
_CONVERSION: Final[Array] = LADDER * np.log(LADDER / (LADDER + 1)) - np.log1p(LADDER)
_GAP: Final[Array] = np.where(LADDER[None, :] > LADDER[:, None], LADDER[None, :] - LADDER[:, None], np.nan)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where and how finely the losses of single steps are resolved: what a cached spectrum depends on.

    Everything is rounded to coarse ladders, so that the grid changes seldom while rounds are added.

    Attributes:
        spacing: h in nats; 2^k or 1.5 * 2^k, so that every i * h is exact in double precision.
        size: number of points N of the transform, 2^k or 3 * 2^k.
        cap: losses of one step above ``cap`` grid points count as infinite.
        tilt: θ per direction (P‖Q, then Q‖P where the pair is not symmetric); see ``spectrum``.
        order: order λ of the Chernoff bound on the mass above the window.
        width: how many standard deviations of one step's noise are resolved.
    """

    spacing: float
    size: int
    cap: int
    tilt: tuple[float, ...]
    order: float
    width: float


@dataclass(frozen=True, slots=True)
class Window:
    """What one query looks at.

    Attributes:
        grid: where the losses of single steps are resolved.
        steps: how many steps are discretised.
    """

    grid: Grid
    steps: int

    def error(self, steepness: float) -> float:
        """Return by how much the spacing is expected to raise ε, in nats, where δ falls like e^(−steepness·ε)."""
        return (steepness + 1) * self.steps * self.grid.spacing**2 / 12


def rough_delta(moments: Array, epsilon: float) -> float:
    """Return a δ near δ(``epsilon``), from Rényi orders, to choose a grid by."""
    log_delta = float(np.min(moments + _CONVERSION - LADDER * epsilon, axis=1).max())
    return math.exp(min(max(log_delta, math.log(FAINTEST)), math.log(0.5)))


def furthest(moments: Array) -> float:
    """Return an ε near which δ has fallen to :data:`FAINTEST`: no need to look beyond."""
    return max(0.0, float(np.min((moments + _CONVERSION - math.log(FAINTEST)) / LADDER, axis=1).max()))


def choose(
    moments: Array, steps: int, distinct: int, delta: float, spacing: float = math.inf, reach: float = 0.0
) -> Window:
    """Choose spacing, window, tilt and orders from the moments of a composition.

    Args:
        moments: log E[e^(λ·loss)] of the whole composition on the ladder; shape [directions, len(LADDER)].
        steps: T, the number of steps that are discretised.
        distinct: the number of different kinds of steps among them.
        delta: the δ of interest.
        spacing: an upper limit on h.
        reach: a loss that the window must cover.

    Raises:
        TooLarge: if no grid within the limits of memory and time gives a useful bound.
    """
    log_inverse = -math.log(delta)
    bound = (moments + _CONVERSION + log_inverse) / LADDER  # ε at Rényi order λ + 1 (Canonne et al. 2020, Prop. 12)
    highest = (moments.max(axis=0) + log_inverse + _RESERVE)[::2] / LADDER[::2]
    targets, saddle = np.min(bound, axis=1), LADDER[np.argmin(bound, axis=1)]
    order = float(LADDER[::2][np.argmin(highest)])
    top = max(float(highest.min()), 1.1 * reach)
    target = max(float(targets.max()), top / 100)
    tilt, length = zip(
        *(_tilt(k, log_inverse, max(float(e), 0.0), steps) for k, e in zip(moments, targets, strict=True)), strict=True
    )
    cost = (float(saddle[np.argmax(targets)]) + 1) * steps / 12  # ε grows by about cost * h²
    window = max(top, 1.2 * target, *length)
    finest = window / min(_MOST, _MOST_WORK // distinct)
    wanted = min(math.sqrt(TOLERANCE * target / cost), spacing, window / _FEWEST)
    if not math.isfinite(window) or cost * finest**2 > _COARSEST * target:
        raise TooLarge(
            f"this composition ({steps} steps of {distinct} kinds, ε near {target:.3g}) cannot be computed soundly "
            f"with {_MOST_WORK} grid points; it was refused rather than approximated"
        )
    h = _round(max(wanted, finest), up=wanted < finest)
    size = int(_round(window / h + 3, up=True))
    cap = math.ceil(2.0 ** math.ceil(math.log2(top)) / h)
    width = float(math.ceil(-float(ndtri(delta * math.exp(-_RESERVE) / steps))))
    # Beyond θh = 1/2 a tilt resolves the rounding of losses, not the losses.
    grid = Grid(h, size, cap, tuple(min(t, 2.0 ** math.floor(-1 - math.log2(h))) for t in tilt), order, width)
    return Window(grid, steps)


def _round(value: float, *, up: bool) -> float:
    """Round to 2^k or 1.5 * 2^k."""
    power = 2.0 ** math.floor(math.log2(value))
    candidates = (power, 1.5 * power, 2 * power)
    return min(c for c in candidates if c >= value) if up else max(c for c in candidates if c <= value)


def _tilt(moments: Array, log_inverse: float, epsilon: float, steps: int) -> tuple[float, float]:
    """Return the tilt θ that needs the shortest window in one direction, and that window's length in nats.

    Folding moves mass down by N h, where it weighs e^(θ N h) times as much, and up, where it weighs e^(−θ N h) times as
    much. Both stay below 1e-7 of δ when N h is at least the length returned. Far from the saddle the transform's
    floating error, about 3e-14 per step, would weigh e^looseness times as much against δ; beyond 1e-4 of δ that counts
    like a longer window.
    """
    looseness = moments - LADDER * epsilon + log_inverse
    excess = np.maximum(looseness + math.log(3e-14 * steps) - math.log(1e-4), 0)
    down = (moments[None, :] - LADDER[:, None] * epsilon / 2 + log_inverse + _RESERVE) / _GAP
    down = np.min(down, axis=1, where=~np.isnan(_GAP), initial=math.inf)
    length = np.maximum(down, (log_inverse + _RESERVE) / LADDER)
    penalised = length * np.exp(np.minimum(excess / 2, 300))
    best = 2 * int(np.argmin(penalised[::2]))
    return float(LADDER[best]), float(length[best])
