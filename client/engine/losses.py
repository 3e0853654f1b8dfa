"""The sum of per-example losses, each the mean over that example's own completion tokens.

Logits are computed at completion positions only: the head's input is gathered first. The gradient is that of the full
computation, because a position without a label contributes exactly nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from client.engine.batches import IGNORED, Batch
from common.errors import InvalidInput

Loss = Callable[[nn.Module, Batch], Tensor]


def causal_lm_loss(*, head_is_trained: bool, chunk: int | None = None) -> Loss:
    """The loss of a causal language model.

    Args:
        head_is_trained: the output head is a site of the engine; its input then keeps the layout [b, t, H].
        chunk: compute logits in pieces of this many vocabulary entries; None computes them at once.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        targets = F.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:]
        weights = 1.0 / (targets != IGNORED).sum(1).clamp(min=1).double()
        gather = _padded if head_is_trained else _flat
        index, kept, owner = gather(targets)
        if not index.numel():
            return torch.zeros((), device=targets.device)
        if chunk is not None and not head_is_trained:
            return _chunked(model, batch, index, kept, weights[owner], chunk)
        with _gathered(_head(model), index):
            logits = _forward(model, batch, use_cache=False)
        logits = logits.reshape(-1, logits.shape[-1])
        each = F.cross_entropy(_wide(logits), kept.reshape(-1), ignore_index=IGNORED, reduction="none")
        return (each * weights[owner].reshape(-1).to(each.dtype)).sum()

    return loss


LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Settings by which models change logits after the head, each with the value that changes nothing."""


def check_chunk(model: nn.Module, chunk: int, head_is_trained: bool) -> None:
    """Refuse to compute this model's logits in pieces where that would not be its loss.

    Raises:
        InvalidInput: the head is trained or of another kind, or something after it changes the logits.
    """
    head = _head(model)
    if chunk < 1 or head_is_trained or type(head) is not nn.Linear:
        raise InvalidInput("vocabulary_chunk must be >= 1 and needs a frozen output head (nn.Linear); leave it out")
    for setting, neutral in LOGIT_SETTINGS.items():
        value = getattr(model.config, setting, neutral)
        if value is not None and value != neutral:
            raise InvalidInput(f"vocabulary_chunk: this model changes its logits ({setting} = {value}); leave it out")


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the class, summed over examples; the model returns logits [b, classes]."""
    return F.cross_entropy(_wide(_forward(model, batch)), batch.labels, reduction="sum")


def _forward(model: nn.Module, batch: Batch, **settings: Any) -> Tensor:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **settings)
    return output if isinstance(output, Tensor) else output.logits


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _flat(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [1, n] of all positions with a label, their labels and the example each belongs to."""
    index = torch.nonzero(targets.reshape(-1) != IGNORED).reshape(1, -1)
    return index, targets.reshape(-1)[index], index // targets.shape[1]


def _padded(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as [b, most labels], so that the example axis stays; fillers carry no label."""
    has_label = targets != IGNORED
    most = int(has_label.sum(1).max())
    order = torch.argsort(has_label.int(), dim=1, descending=True, stable=True)[:, :most]
    owner = torch.arange(targets.shape[0], device=targets.device)[:, None].expand(-1, most)
    return order + owner * targets.shape[1], targets.gather(1, order), owner


def _head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()


@contextmanager
def _gathered(head: nn.Module, index: Tensor) -> Iterator[None]:
    """While open, ``head`` sees only the positions ``index`` [k, n] of its input [b, T, H], as [k, n, H]."""

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        return (hidden.index_select(0, index.reshape(-1)).view(*index.shape, -1), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _chunked(model: nn.Module, batch: Batch, index: Tensor, kept: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Cross-entropy without ever holding all logits: the head's input is captured, its product is done in pieces."""
    head = _head(model)
    caught: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        caught.append(hidden.reshape(-1, hidden.shape[-1]).index_select(0, index.reshape(-1)))
        return hidden.new_zeros(1, 1, head.weight.shape[0])  # what follows the head is not used

    original = head.__dict__.get("forward")
    head.forward = capture
    try:
        _forward(model, batch, use_cache=False)
    finally:
        if original is None:
            del head.forward
        else:
            head.forward = original
    bias = getattr(head, "bias", None)
    return ChunkedCrossEntropy.apply(caught[0], head.weight, bias, kept.reshape(-1), weights.reshape(-1), chunk)


class ChunkedCrossEntropy(Function):
    """Σ_j w_j (logsumexp(z_j) − z_j[y_j]) with z = h Wᵀ + c, over pieces of the vocabulary.

    The forward pass keeps a running maximum and sum; the backward pass computes each piece again. Memory for logits is
    n · chunk instead of n · V. The head is frozen: only ``h`` gets a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, chunk: int
    ) -> Tensor:
        """Hidden [n, H], weight [V, H], bias [V] or None, target [n], scale w [n]; returns the scalar sum."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.full((hidden.shape[0],), float("-inf"), dtype=wide, device=hidden.device)
        picked = torch.zeros_like(total)
        for start in range(0, weight.shape[0], chunk):
            z = _piece(hidden, weight, bias, start, chunk, wide)
            total = torch.logaddexp(total, torch.logsumexp(z, dim=1))
            inside = (target >= start) & (target < start + z.shape[1])
            at = (target - start).clamp(0, z.shape[1] - 1)
            picked = torch.where(inside, z.gather(1, at[:, None])[:, 0], picked)
        ctx.save_for_backward(hidden, weight, bias, target, scale, total)
        ctx.chunk, ctx.wide = chunk, wide
        return ((total - picked) * scale.to(wide)).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``hidden``: Σ over pieces of (softmax − onehot) W."""
        hidden, weight, bias, target, scale, total = ctx.saved_tensors
        factor = (scale.to(ctx.wide) * g)[:, None]
        grad = torch.zeros(hidden.shape, dtype=ctx.wide, device=hidden.device)
        for start in range(0, weight.shape[0], ctx.chunk):
            z = _piece(hidden, weight, bias, start, ctx.chunk, ctx.wide)
            p = torch.exp_(z.sub_(total[:, None]))
            inside = ((target >= start) & (target < start + p.shape[1])).to(p.dtype)
            at = (target - start).clamp(0, p.shape[1] - 1)[:, None]
            p.scatter_add_(1, at, -inside[:, None])
            grad.add_(
                (p.mul_(factor).to(hidden.dtype) @ weight[start : start + ctx.chunk].to(hidden.dtype)).to(ctx.wide)
            )
        return grad.to(hidden.dtype), None, None, None, None, None


def _piece(hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, chunk: int, wide: torch.dtype) -> Tensor:
    part = None if bias is None else bias[start : start + chunk].to(hidden.dtype)
    return F.linear(hidden, weight[start : start + chunk].to(hidden.dtype), part).to(wide)
