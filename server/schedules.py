"""What changes over the rounds: the server's learning rate, and the noise that goes with it. All public, all preset.

>>> [round(rate_factor("step", (t - 1) / 8), 3) for t in range(1, 9)]
[1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
"""

from __future__ import annotations

import math
from collections.abc import Callable

from common.config import RunConfig
from common.privacy.pairs import Array
from common.privacy.schedules import shape

LAST_RATE = 0.1
"""Where the exponential learning rate ends, over where it began."""

RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "step": lambda progress: 0.5 ** math.floor(4 * progress),
    "exponential": lambda progress: LAST_RATE**progress,
}
"""Factor on the server's learning rate when that share of the rounds lies behind; ``step`` halves it at each quarter.

Noise that is averaged over ever smaller steps hurts the last adapter less.
"""


def rate_factor(kind: str, progress: float) -> float:
    """The factor on the server's learning rate after ``progress`` (in [0, 1)) of the rounds; > 0."""
    return RATES[kind](progress)


def noise_shape(config: RunConfig) -> Array:
    """Relative noise of each round, 1 at the first; shape [rounds].

    ``lr-matched`` makes it proportional to (the server's learning rate)^(-1/2): of all lists of the same cost in zCDP,
    the one by which the least noise reaches the adapter (Wu et al. 2021, arXiv 2110.07435).
    """
    return shape_of(
        config.noise_schedule,
        config.rounds,
        final=config.noise_final,
        drop=config.noise_drop,
        every=config.noise_every,
        server_schedule=config.server_schedule,
    )


def shape_of(
    kind: str, rounds: int, *, final: float, drop: float, every: int | None, server_schedule: str = "constant"
) -> Array:
    """``noise_shape`` from single settings, for plans; ``every`` is a quarter of the rounds if nobody says.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    if server_schedule not in RATES:
        raise ValueError(f"server_schedule must be one of {', '.join(RATES)}, got {server_schedule!r}")
    return shape(
        kind,  # type: ignore[arg-type]  # an unknown one is refused by name
        rounds,
        final=final,
        drop=drop,
        every=every or max(1, rounds // 4),
        learning_rates=[rate_factor(server_schedule, t / max(1, rounds)) for t in range(rounds)],
    )
