"""The places where trainable parameters act: LoRA linears and trainable dense layers, each able to write its rows.

A site gets its example axis from the shape alone: [b, ..., features] or, where a model flattens before a dense layer
(OPT's fc1), [b·T, features]. Any other layout is refused with the module's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.engine.dropout import dropped
from client.engine.kernels import FusedLora, LoraBranch, OwnedLinear, compute_dtype
from client.engine.layout import Arena, Layout
from common.errors import InvalidInput


@dataclass
class Frame:
    """The micro-batch in flight: its example count b, padded length T, where gradients go, and the dropout in force.

    ``total`` is set for a plain sum: gradients are then added over examples into that flat vector [P].
    """

    layout: Layout
    arena: Arena
    batch_size: int = 0
    length: int = 0
    total: Tensor | None = None
    seeds: Tensor | None = None

    def drop(self, name: str, rate: float, x: Tensor) -> Tensor:
        """``x`` with each record's own dropout at the layer ``name``; unchanged while dropout is off."""
        return x if self.seeds is None else dropped(x, self.seeds, name, rate, self.length)

    def examples(self, name: str, shape: torch.Size) -> int:
        """Check that ``shape`` puts examples first, and return b.

        Raises:
            InvalidInput: it does not; the message names the module.
        """
        b, rows = self.batch_size, shape[:-1].numel()
        batched = len(shape) >= 2 and shape[0] == b
        flattened = len(shape) == 2 and shape[0] == b * self.length
        if not (batched or flattened) or rows % b:
            raise InvalidInput(
                f"{name}: unknown layout {tuple(shape)} for {b} examples of length {self.length}; "
                "the engine owns [examples, ..., features] and [examples*length, features]. "
                "Take the module out of target_modules"
            )
        return b

    def add(self, shape: tuple[int, ...], offset: int, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ right per example into the slot of ``shape`` (p, k): left [n, p], right [n, k], n = b·t rows."""
        if self.total is not None:
            size = shape[0] * shape[1]
            target = self.total[offset : offset + size].view(shape)
            target.addmm_(left.t().to(target.dtype), right.to(target.dtype))
            return
        b = self.batch_size
        target = self.arena.view(offset, shape)
        left3, right3 = left.view(b, -1, shape[0]).transpose(1, 2), right.view(b, -1, shape[1])
        first = self.arena.first(offset)
        if left.dtype == target.dtype:
            torch.bmm(left3, right3, out=target) if first else target.baddbmm_(left3, right3)
        elif first:
            target.copy_(torch.bmm(left3, right3))
        else:
            target.add_(torch.bmm(left3, right3))

    def add_bias(self, size: int, offset: int, g: Tensor, scale: float = 1.0) -> None:
        """Add the column sums of g [n, size] per example, times ``scale``."""
        if self.total is not None:
            self.total[offset : offset + size].add_(g.sum(0, dtype=self.total.dtype), alpha=scale)
            return
        target = self.arena.view(offset, (size,))
        value = g.view(self.batch_size, -1, size).sum(1, dtype=target.dtype).mul_(scale)
        target.copy_(value) if self.arena.first(offset) else target.add_(value)


@dataclass
class LoraSite:
    """One LoRA linear layer with its active adapter; A, B, B's bias and the base's bias are each trained or frozen."""

    name: str
    module: Any
    adapter: str
    frame: Frame
    transposed: bool = False
    dense: bool = True

    def __post_init__(self) -> None:
        m, k = self.module, self.adapter
        self.a: nn.Parameter = m.lora_A[k].weight
        self.b: nn.Parameter = m.lora_B[k].weight
        self.b_bias: nn.Parameter | None = m.lora_B[k].bias
        self.scaling = float(m.scaling[k])
        self.dropout = float(getattr(m.lora_dropout[k], "p", 0.0))
        owns = self.frame.layout.owns
        self.trains_a, self.trains_b, self.trains_b_bias = owns(self.a), owns(self.b), owns(self.b_bias)
        self.trains_base_bias = owns(getattr(m.base_layer, "bias", None))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this site."""
        candidates = (self.a, self.b, self.b_bias, getattr(self.module.base_layer, "bias", None))
        return [p for p in candidates if p is not None and self.frame.layout.owns(p)]

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """What the site computes in: autocast's dtype, else the dense base's, else (quantised base) that of ``x``."""
        return compute_dtype(x, self.module.base_layer.weight if self.dense else x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for the layer's forward while the engine runs."""
        base = self.module.base_layer
        dropping = self.dropout > 0.0 and self.frame.seeds is not None
        if self.dense and not dropping:
            return FusedLora.apply(x, base.weight, base.bias, self.a, self.b, self.b_bias, self)
        out = self._dense(x) if self.dense else base(x, *args, **kwargs)
        kept = self.frame.drop(self.name, self.dropout, x) if dropping else x
        return out + LoraBranch.apply(kept, self.a, self.b, self.b_bias, self).to(out.dtype)

    def _dense(self, x: Tensor) -> Tensor:
        """The dense base alone. Its bias is detached: a trained bias gets its rows from ``write``."""
        base = self.module.base_layer
        bias = None if base.bias is None else base.bias.detach()
        return F.linear(x, base.weight.t() if self.transposed else base.weight, bias)

    def write(self, shape: torch.Size, x: Tensor | None, h: Tensor | None, g: Tensor, u: Tensor | None) -> None:
        """Write this site's rows. x [n, in], h = x Aᵀ [n, r], g [n, out], u = s g B [n, r]."""
        frame, offset = self.frame, self.frame.layout.offset
        frame.examples(self.name, shape)
        if self.trains_a and u is not None and x is not None:
            frame.add(tuple(self.a.shape), offset(self.a), u, x)
        if self.trains_b and h is not None:
            frame.add(tuple(self.b.shape), offset(self.b), g, h * self.scaling)
        if self.trains_b_bias and self.b_bias is not None:
            frame.add_bias(self.b_bias.numel(), offset(self.b_bias), g, self.scaling)
        if self.trains_base_bias and self.dense:
            bias = self.module.base_layer.bias
            frame.add_bias(bias.numel(), offset(bias), g)


@dataclass
class LinearSite:
    """A trainable dense layer: a head in ``modules_to_save``, or any ``nn.Linear`` with requires_grad."""

    name: str
    module: nn.Linear
    frame: Frame

    def __post_init__(self) -> None:
        owns = self.frame.layout.owns
        self.trains_weight, self.trains_bias = owns(self.module.weight), owns(self.module.bias)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this site."""
        return [p for p in (self.module.weight, self.module.bias) if p is not None and self.frame.layout.owns(p)]

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """What the layer computes in."""
        return compute_dtype(x, self.module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Stand in for the layer's forward while the engine runs."""
        return OwnedLinear.apply(x, self.module.weight, self.module.bias, self)

    def write(self, shape: torch.Size, x: Tensor | None, g: Tensor) -> None:
        """Write this layer's rows. x [n, in], g [n, out]."""
        frame, offset = self.frame, self.frame.layout.offset
        frame.examples(self.name, shape)
        if self.trains_weight and x is not None:
            frame.add(tuple(self.module.weight.shape), offset(self.module.weight), g, x)
        if self.trains_bias:
            frame.add_bias(self.module.bias.numel(), offset(self.module.bias), g)


Site = LoraSite | LinearSite
