"""Clipping rules: what each example's gradient row is multiplied by before rows are summed, and the noise for the sum.

Guarantee: the norm of every summed row, in the rule's own coordinates, is at most its threshold, for every finite row;
a row that is not finite contributes zero. Adding or removing one record therefore moves the sum by at most that much,
and noise of the rule's standard deviations costs exactly one Gaussian of the stated ``noise_multiplier`` (DESIGN §4.4).

Each rule can also *normalise* instead of clipping ("automatic clipping", Bu, Wang, Zha, Karypis 2023, arXiv 2206.07136,
AUTO-S): the row is multiplied by C/(|g| + γ), whatever its norm. Its norm is then C·|g|/(|g| + γ) < C, so the guarantee
and the noise are the same; small gradients are made as long as large ones, and γ keeps zero at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from client.engine.layout import Layout
from common.errors import InvalidInput
from common.privacy.allocation import MAX_CONDITION, cheapest_noise_stds

MARGIN = {torch.float32: 1.0 - 2.0**-20, torch.float64: 1.0 - 2.0**-45}
"""Thresholds are lowered by one part in a million: more than the norm's and the product's rounding."""
NORM_BLOCK = 128
"""Squares are summed in float32 inside a block of so many entries: in 1,024, one large entry can hide 4e-6 of the norm
behind float32's rounding, in 128 at most 4.3e-7. It divides ``BLOCK``, so that whole rows fall into whole blocks."""
LEAST_THRESHOLD = 1e-10
"""No threshold, in the units of the gradient, is smaller. Float32 squares of entries below 1e-19 lose their bits and
below 4e-23 vanish: a row of them would be found to have no length, and pass a smaller threshold unclipped."""


class Rule(Protocol):
    """How rows are clipped, and the noise's standard deviation for each coordinate of their sum."""

    def check(self, layout: Layout) -> None:
        """Raise ``InvalidInput`` unless the rule covers exactly the trainable parameters: before a record is read."""

    def add(self, rows: Tensor, layout: Layout, total: Tensor) -> Tensor:
        """Add the clipped rows [b, stride] to ``total`` [stride]; return each row's norm over its threshold [b]."""

    def noise_std(self, layout: Layout, noise_multiplier: float) -> float | np.ndarray:
        """Standard deviation of the noise: one number, or one per coordinate [P]."""

    def hides(self, layout: Layout, noise_std: float | np.ndarray) -> float:
        """The noise multiplier that noise of ``noise_std`` amounts to: 1 / sup |Σ^(-1/2) Δ| over one record's Δ."""


@dataclass(frozen=True)
class FlatClipping:
    """min(1, C/|g|) g over all trainable parameters together (Abadi et al. 2016, Algorithm 1).

    Attributes:
        clipping_norm: C. stability: γ of automatic clipping; None clips.
    """

    clipping_norm: float
    stability: float | None = None

    def __post_init__(self) -> None:
        check_clipping_norm(self.clipping_norm)
        _check_stability(self.stability)

    def check(self, layout: Layout) -> None:
        """Flat clipping covers whatever is trainable."""

    def add(self, rows: Tensor, layout: Layout, total: Tensor) -> Tensor:
        """See ``Rule.add``."""
        return _clip_and_add(rows, row_norms(rows), self.clipping_norm, total, self.stability)

    def noise_std(self, layout: Layout, noise_multiplier: float) -> float:
        """σ C on every coordinate."""
        return noise_multiplier * self.clipping_norm

    def hides(self, layout: Layout, noise_std: float | np.ndarray) -> float:
        """A record's Δ may lie along the coordinate with the least noise: min s / C."""
        return float(np.min(noise_std)) / self.clipping_norm


@dataclass(frozen=True)
class ShapedClipping:
    """Clip |S⁻¹g| ≤ C and add S·N(0, σ²C²I), S diagonal with one scale per parameter tensor.

    The cost is that of σ whatever S is, provided S is fixed before the step and made from public values or from outputs
    of mechanisms that were charged: the caller's duty, because no code can see where a number came from.

    Attributes:
        clipping_norm: C, in the coordinates of S⁻¹g.
        scales: parameter name to s > 0; every trainable parameter must be named.
        stability: γ of automatic clipping, in the coordinates of S⁻¹g; None clips.
    """

    clipping_norm: float
    scales: Mapping[str, float]
    stability: float | None = None

    def __post_init__(self) -> None:
        check_clipping_norm(self.clipping_norm)
        _check_stability(self.stability)
        values = np.array(list(self.scales.values()), dtype=np.float64)
        if not values.size or not (np.isfinite(values).all() and (values > 0).all()):
            raise InvalidInput("every scale of a shaping must be > 0 and finite")
        if values.max() / values.min() > MAX_CONDITION:
            raise InvalidInput(
                f"the scales of a shaping span {values.max() / values.min():.3g}, at most {MAX_CONDITION:g} is allowed"
            )
        check_clipping_norm(self.clipping_norm * float(values.min()))

    def check(self, layout: Layout) -> None:
        """See ``Rule.check``."""
        _same_names(self.scales, layout, "scales")

    def add(self, rows: Tensor, layout: Layout, total: Tensor) -> Tensor:
        """See ``Rule.add``."""
        parts = [slot_norms(rows, layout, name) / scale for name, scale in self.scales.items()]
        norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return _clip_and_add(rows, norms, self.clipping_norm, total, self.stability)

    def noise_std(self, layout: Layout, noise_multiplier: float) -> np.ndarray:
        """σ C s on the coordinates of each parameter."""
        self.check(layout)
        return _spread(layout, {name: noise_multiplier * self.clipping_norm * s for name, s in self.scales.items()})

    def hides(self, layout: Layout, noise_std: float | np.ndarray) -> float:
        """In the coordinates of S⁻¹g a record's Δ has length C, along any of them: min s_j / (S_j C)."""
        return float(np.min(noise_std / _spread(layout, self.scales))) / self.clipping_norm


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together.

    Attributes:
        names: parameter names.
        clipping_norm: this group's threshold C_g.
        share: the part of the budget 1/σ² that its noise may use; shares of all groups add up to 1.
    """

    names: tuple[str, ...]
    clipping_norm: float
    share: float


@dataclass(frozen=True)
class GroupClipping:
    """Each group g of parameters is clipped on its own to C_g and gets noise s_g = σ C_g / √share_g.

    Then Σ_g (C_g/s_g)² = Σ_g share_g / σ² = 1/σ²: one Gaussian of noise multiplier σ (DESIGN §4.4).

    Attributes:
        groups: disjoint, covering every trainable parameter. stability: γ of automatic clipping, in each group.
    """

    groups: tuple[Group, ...]
    stability: float | None = None

    def __post_init__(self) -> None:
        _check_stability(self.stability)
        for group in self.groups:
            check_clipping_norm(group.clipping_norm)
            if not 0.0 < group.share <= 1.0:
                raise InvalidInput(f"a group's share must be in (0, 1], got {group.share}")
        if not isclose(sum(group.share for group in self.groups), 1.0, rel_tol=0.0, abs_tol=1e-12):
            raise InvalidInput(f"the groups' shares must add up to 1, got {sum(g.share for g in self.groups):.6g}")
        names = [name for group in self.groups for name in group.names]
        if len(names) != len(set(names)):
            raise InvalidInput("a parameter is in two clipping groups")

    @classmethod
    def equal(cls, layout: Layout, clipping_norm: float, groups: Mapping[str, tuple[str, ...]]) -> GroupClipping:
        """Groups with equal thresholds C/√G and equal shares: the whole row's norm stays at most ``clipping_norm``."""
        _same_names([name for names in groups.values() for name in names], layout, "groups")
        each = check_clipping_norm(clipping_norm) / sqrt(len(groups))
        return cls(tuple(Group(names, each, 1.0 / len(groups)) for names in groups.values()))

    @classmethod
    def cheapest(
        cls,
        layout: Layout,
        clipping_norms: Mapping[str, float],
        groups: Mapping[str, tuple[str, ...]],
        stability: float | None = None,
    ) -> GroupClipping:
        """Groups with the given thresholds whose noise has the least total variance; see ``cheapest_noise_stds``."""
        _same_names([name for names in groups.values() for name in names], layout, "groups")
        norms = [check_clipping_norm(clipping_norms[group]) for group in groups]
        sizes = [sum(layout.slots[name].size for name in names) for names in groups.values()]
        shares = (np.array(norms) / cheapest_noise_stds(1.0, norms, sizes)) ** 2
        shares /= shares.sum()
        each = zip(groups.values(), norms, shares, strict=True)
        return cls(tuple(Group(names, norm, float(share)) for names, norm, share in each), stability)

    def check(self, layout: Layout) -> None:
        """See ``Rule.check``."""
        _same_names([name for group in self.groups for name in group.names], layout, "groups")

    def add(self, rows: Tensor, layout: Layout, total: Tensor) -> Tensor:
        """See ``Rule.add``; the returned ratio is the largest of the groups'."""
        whole = _zero_bad_rows(rows, row_norms(rows))
        ratios = [torch.where(torch.isfinite(whole), 0.0, whole)]
        for group in self.groups:
            parts = torch.stack([slot_norms(rows, layout, name) for name in group.names])
            norms = torch.linalg.vector_norm(parts, dim=0)
            factors = _factors(norms, group.clipping_norm, rows.dtype, self.stability)
            for name in group.names:
                slot = layout.slots[name]
                part = slice(slot.offset, slot.offset + slot.size)
                total[part].addmv_(rows[:, part].t(), factors)
            ratios.append(norms / group.clipping_norm)
        return torch.stack(ratios).amax(0)

    def noise_std(self, layout: Layout, noise_multiplier: float) -> np.ndarray:
        """σ C_g / √share_g on the coordinates of group g."""
        self.check(layout)
        each = {name: noise_multiplier * g.clipping_norm / sqrt(g.share) for g in self.groups for name in g.names}
        return _spread(layout, each)

    def hides(self, layout: Layout, noise_std: float | np.ndarray) -> float:
        """A record may fill every group at once: 1/σ² = Σ_g (C_g/min s_g)²."""
        std = np.broadcast_to(noise_std, layout.num_parameters)
        slots = {g: [layout.slots[name] for name in g.names] for g in self.groups}
        least = {g: min(std[s.offset : s.offset + s.size].min() for s in own) for g, own in slots.items()}
        return float(1.0 / sqrt(sum((g.clipping_norm / s) ** 2 for g, s in least.items())))


def sound_noise_std(rule: Rule, layout: Layout, noise_multiplier: float) -> float | np.ndarray:
    """The rule's noise, if it hides a record as well as one Gaussian of ``noise_multiplier`` does.

    "Importance" weights of mean 1 on the noise under ordinary clipping do not: their worst record lies along the
    smallest weight (claimed ε 4.38, truly 6.7 to 23.7). Such a rule is refused here, before a record is read.

    Raises:
        InvalidInput: the noise amounts to less than ``noise_multiplier``.
    """
    rule.check(layout)
    std = rule.noise_std(layout, noise_multiplier)
    found = rule.hides(layout, std)
    if not found >= noise_multiplier * (1.0 - 1e-9):
        raise InvalidInput(
            f"{type(rule).__name__}: its noise amounts to a noise multiplier of {found:.4g}, but "
            f"{noise_multiplier:.4g} is charged: clip in the scaled norm (ShapedClipping), or charge the smallest"
        )
    return std


def as_rule(clipping: float | Rule) -> Rule:
    """A number means flat clipping at that norm."""
    return FlatClipping(float(clipping)) if isinstance(clipping, int | float) else clipping


def check_clipping_norm(clipping_norm: float) -> float:
    """Return ``clipping_norm`` if it is finite and at least ``LEAST_THRESHOLD``.

    Raises:
        InvalidInput: otherwise.
    """
    if not LEAST_THRESHOLD <= float(clipping_norm) < float("inf"):
        raise InvalidInput(f"clipping_norm must be >= {LEAST_THRESHOLD:g} and finite, got {clipping_norm}")
    return float(clipping_norm)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norms of ``rows`` [b, k·BLOCK] in float64 [b]: float32 inside blocks of ``NORM_BLOCK``, float64 across them.

    A plain float32 sum of a million squares is wrong by 1e-5; this one usually by 1e-8 and at worst by less than
    ``MARGIN`` leaves, at the same price.
    """
    blocks = torch.linalg.vector_norm(rows.view(rows.shape[0], -1, NORM_BLOCK), dim=2)
    return torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64)


def slot_norms(rows: Tensor, layout: Layout, name: str) -> Tensor:
    """L2 norms [b] of one parameter's part of the rows, in float64 across blocks like ``row_norms``."""
    slot = layout.slots[name]
    part = rows[:, slot.offset : slot.offset + slot.size]
    whole = slot.size // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(part[:, :whole].unflatten(1, (-1, NORM_BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(part[:, whole:], dim=1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([blocks, rest], dim=1), dim=1, dtype=torch.float64)


def _check_stability(stability: float | None) -> None:
    if stability is not None and not 0.0 < stability < float("inf"):
        raise InvalidInput(f"the stability constant of automatic clipping must be > 0, got {stability}")


def _clip_and_add(
    rows: Tensor, norms: Tensor, clipping_norm: float, total: Tensor, stability: float | None = None
) -> Tensor:
    norms = _zero_bad_rows(rows, norms)
    total.addmv_(rows.t(), _factors(norms, clipping_norm, rows.dtype, stability))
    return norms / clipping_norm


def _factors(norms: Tensor, clipping_norm: float, dtype: torch.dtype, stability: float | None) -> Tensor:
    if stability is not None:
        return (clipping_norm * MARGIN[dtype] / (norms + stability)).to(dtype)
    least = torch.finfo(torch.float64).tiny
    return torch.clamp(clipping_norm * MARGIN[dtype] / norms.clamp(min=least), max=1.0).to(dtype)


def _zero_bad_rows(rows: Tensor, norms: Tensor) -> Tensor:
    """Overwrite rows that are not finite by zero (zero times infinity is not zero); their norm becomes infinity."""
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return norms
    rows[~finite] = 0.0
    return torch.where(finite, norms, torch.inf)


def _same_names(given: Mapping[str, float] | list[str], layout: Layout, what: str) -> None:
    odd = sorted(set(given) ^ set(layout.slots))
    if odd:
        raise InvalidInput(f"{what} must name every trainable parameter and no other: {', '.join(odd[:3])}")


def _spread(layout: Layout, values: Mapping[str, float]) -> np.ndarray:
    out = np.empty(layout.num_parameters)
    for name, slot in layout.slots.items():
        out[slot.offset : slot.offset + slot.size] = values[name]
    return out
