"""From a plan's ``Mechanism`` to the engine's clipping rule: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from client.engine.adaptive import AdaptiveClipping
from client.engine.clipping import FlatClipping, GroupClipping, Rule, ShapedClipping
from client.engine.layout import Layout
from common.errors import InvalidInput
from common.mechanism import STABILITY, Mechanism, module_of


def rule_maker(mechanism: Mechanism, layout: Layout) -> Callable[[float], Rule]:
    """From C to the rule of one step.

    With ``min-energy`` every module is clipped to C/√G (a whole row to at most C) and gets the noise of least total
    variance. With ``importance`` the clipping is in the scaled norm; without scales, the first rounds, it is flat.

    Raises:
        InvalidInput: an unknown name, or scales that do not name exactly the trained tensors.
    """
    stability = STABILITY if mechanism.clipping == "automatic" else None
    if mechanism.noise_allocation == "min-energy":
        groups: dict[str, tuple[str, ...]] = {}
        for name in layout.slots:
            groups[module_of(name)] = (*groups.get(module_of(name), ()), name)
        share = 1.0 / sqrt(len(groups))
        return lambda norm: GroupClipping.cheapest(layout, dict.fromkeys(groups, norm * share), groups, stability)
    if mechanism.noise_allocation == "importance" and mechanism.scales:
        scales = dict(mechanism.scales)
        return lambda norm: ShapedClipping(norm, scales, stability)
    if mechanism.noise_allocation not in ("uniform", "importance"):
        raise InvalidInput(f"noise-allocation {mechanism.noise_allocation!r} is not known here")
    return lambda norm: FlatClipping(norm, stability)


def adaptation(mechanism: Mechanism) -> AdaptiveClipping | None:
    """The settings of adaptive clipping; None where C stays fixed."""
    if mechanism.clipping != "adaptive":
        return None
    return AdaptiveClipping(
        quantile=mechanism.quantile,
        learning_rate=mechanism.clipping_rate,
        lower=mechanism.lower,
        upper=mechanism.upper,
        count_noise=mechanism.count_noise,
    )
