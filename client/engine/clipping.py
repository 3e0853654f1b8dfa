"""Clipping rules: what each example's gradient row is multiplied by before the rows are summed.

Guarantee: the norm of every summed row, in the rule's own coordinates, is at most its threshold, for every finite row;
a row that is not finite contributes zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from client.engine.layout import BLOCK
from common.errors import InvalidInput

MARGIN = {torch.float32: 1.0 - 2.0**-20, torch.float64: 1.0 - 2.0**-45}
"""Thresholds are lowered by one part in a million: more than the norm's and the product's rounding."""


def check_clipping_norm(clipping_norm: float) -> float:
    """Return ``clipping_norm`` if it is a positive finite number.

    Raises:
        InvalidInput: otherwise.
    """
    if not 0.0 < float(clipping_norm) < float("inf"):
        raise InvalidInput(f"clipping_norm must be > 0 and finite, got {clipping_norm}")
    return float(clipping_norm)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norms of ``rows`` [b, k·BLOCK] in float64 [b]: float32 inside blocks, float64 across them.

    A plain float32 sum of a million squares is wrong by 1e-5; this one by 1e-8, at the same price.
    """
    blocks = torch.linalg.vector_norm(rows.view(rows.shape[0], -1, BLOCK), dim=2)
    return torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64)


def clip_and_add(rows: Tensor, clipping_norm: float, total: Tensor) -> Tensor:
    """Add Σ_i min(1, C/|g_i|) g_i to ``total`` [k·BLOCK]; return the norms [b].

    Rows that are not finite are overwritten by zero (zero times infinity is not zero) and have norm infinity.
    """
    norms = row_norms(rows)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        rows[~finite] = 0.0
        norms = torch.where(finite, norms, torch.inf)
    factors = torch.clamp(
        clipping_norm * MARGIN[rows.dtype] / norms.clamp(min=torch.finfo(torch.float64).tiny), max=1.0
    )
    total.addmv_(rows.t(), factors.to(rows.dtype))
    return norms
