"""Autograd functions that write per-example weight gradients into an arena during the ordinary backward pass.

For y = x Wᵀ + s (x Aᵀ) Bᵀ and one example with T positions, the gradients are  ∂A = Σ_t u_tᵀ x_t  with  u = s (g B)
and  ∂B = Σ_t g_tᵀ (s h_t)  with  h = x Aᵀ  (Hu et al. 2021, "LoRA", eq. 3, differentiated). The rank is small, so
forming them per example (one batched product) costs the same operations as forming their sum.

Shapes: b examples, T positions, n = b·T rows; x [n, in], g [n, out], A [r, in], B [out, r].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from client.engine.sites import LinearSite, LoraSite


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class FusedLora(Function):
    """A frozen dense base and its LoRA branch in one node; nothing but ``x`` or ``h`` is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, b_bias: Tensor | None,
        site: LoraSite,
    ) -> Tensor:  # fmt: skip
        """Return the site's output [..., out]; ``weight`` is [in, out] where ``site.transposed`` (Conv1D)."""
        dtype = site.compute_dtype(x)
        x2 = _matrix(x).to(dtype)
        w, a_, b_ = weight.to(dtype), a.to(dtype), b.to(dtype)
        bias_ = None if bias is None else bias.to(dtype)
        out = F.linear(x2, w.t() if site.transposed else w, bias_)
        h = x2 @ a_.t()
        out.addmm_(h, b_.t(), alpha=site.scaling)
        if b_bias is not None:
            out.add_(b_bias.to(dtype), alpha=site.scaling)
        ctx.site, ctx.shape, ctx.x_dtype = site, x.shape, x.dtype
        # The weights go through save_for_backward as they are: a cast copy would stay alive for every layer.
        ctx.save_for_backward(x2 if site.trains_a else None, h if site.trains_b else None, weight, a_, b_)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Write the rows of A and B; return the gradient of ``x`` alone."""
        site = ctx.site
        x2, h, weight, a, b = ctx.saved_tensors
        g2 = _matrix(g)
        needs_x = ctx.needs_input_grad[0]
        u = (g2 @ b).mul_(site.scaling) if needs_x or site.trains_a else None
        grad_x = None
        if needs_x:
            w = weight.to(g2.dtype)
            grad_x = (g2 @ (w.t() if site.transposed else w)).addmm_(u, a).view(ctx.shape).to(ctx.x_dtype)
        site.write(ctx.shape, x2, h, g2, u)
        return grad_x, None, None, None, None, None, None


class LoraBranch(Function):
    """The LoRA branch alone, s (x Aᵀ) Bᵀ: beside a base with a forward of its own (quantised), or with dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, b_bias: Tensor | None, site: LoraSite) -> Tensor:
        """Return the branch's output [..., out]."""
        dtype = site.compute_dtype(x)
        x2 = _matrix(x).to(dtype)
        a_, b_ = a.to(dtype), b.to(dtype)
        h = x2 @ a_.t()
        out = (h @ b_.t()).mul_(site.scaling)
        if b_bias is not None:
            out.add_(b_bias.to(dtype), alpha=site.scaling)
        ctx.site, ctx.shape, ctx.x_dtype = site, x.shape, x.dtype
        ctx.save_for_backward(x2 if site.trains_a else None, h if site.trains_b else None, a_, b_)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Write the rows of A and B; return the gradient of ``x`` alone."""
        site = ctx.site
        x2, h, a, b = ctx.saved_tensors
        g2 = _matrix(g).to(a.dtype)
        needs_x = ctx.needs_input_grad[0]
        u = (g2 @ b).mul_(site.scaling) if needs_x or site.trains_a else None
        grad_x = (u @ a).view(ctx.shape).to(ctx.x_dtype) if needs_x and u is not None else None
        site.write(ctx.shape, x2, h, g2, u)
        return grad_x, None, None, None, None


class OwnedLinear(Function):
    """A trainable dense layer (a classification head): its weight and bias rows are written like LoRA's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite) -> Tensor:
        """Return x Wᵀ + c, [..., out]."""
        dtype = site.compute_dtype(x)
        x2, w = _matrix(x).to(dtype), weight.to(dtype)
        out = F.linear(x2, w, None if bias is None else bias.to(dtype))
        ctx.site, ctx.shape, ctx.x_dtype = site, x.shape, x.dtype
        ctx.save_for_backward(x2 if site.trains_weight else None, weight)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Write the rows of weight and bias; return the gradient of ``x`` alone."""
        x2, weight = ctx.saved_tensors
        g2 = _matrix(g)
        grad_x = (g2 @ weight.to(g2.dtype)).view(ctx.shape).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        ctx.site.write(ctx.shape, x2, g2)
        return grad_x, None, None, None


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a dense layer computes in: autocast's where it is on, otherwise the weight's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
