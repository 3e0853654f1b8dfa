"""Running the stock model safely: evaluation mode, the caller's gradients set aside, autocast, and its own gradient.

Guarantee: whatever is changed on the model inside these contexts is put back when they close.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.engine.batches import Batch
from client.engine.layout import Arena, Layout
from client.engine.losses import Loss


@contextmanager
def precision(layout: Layout, autocast: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``autocast`` on the model's device; None computes in the weights' own dtype.

    On a CPU, attention is then torch's plain one: the backward pass of its fused one takes ten times as long in bf16 as
    in float32, more than half of a step (torch 2.13; benchmarks/LOG.md).
    """
    with ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(torch.autocast(layout.device.type, dtype=autocast))
            if layout.device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def evaluating(model: nn.Module, *, checkpoint: bool = True) -> Iterator[None]:
    """Evaluation mode (no dropout), except the flag that Hugging Face's layers ask before they checkpoint.

    A layer under that flag which applies a dropout rate of its own (OPT's) has the rate set to 0 meanwhile.
    ``checkpoint=False`` keeps everything instead of recomputing it.
    """
    kept: list[tuple[Any, str, Any]] = [(module, "training", module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):  # a decoder would keep keys and values that nobody reads
        kept.append((config, "use_cache", config.use_cache))
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            kept += [(module, k, v) for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
    try:
        for module, name, _ in kept:
            asked = checkpoint and bool(getattr(module, "gradient_checkpointing", False))
            setattr(module, name, {"training": asked, "use_cache": False}.get(name, 0.0))
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextmanager
def without_gradients(layout: Layout) -> Iterator[None]:
    """Gradients enabled, and whatever ``.grad`` the caller left on the parameters set aside."""
    kept = {name: parameter.grad for name, parameter in layout.parameters.items()}
    for parameter in layout.parameters.values():
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in layout.parameters.items():
            parameter.grad = kept[name]


def put_back(module: nn.Module, original: object | None) -> None:
    """Give ``module`` the forward it had: ``original`` of its own, or its class's."""
    if original is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = original


def looks_ahead(model: nn.Module) -> bool:
    """Whether a position's logits depend on later tokens, tried on made-up tokens: true for a plain encoder.

    A model that gives different logits for the same tokens twice is not judged; the self-test names that.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    with evaluating(model, checkpoint=False), torch.no_grad():
        logits = model(input_ids=tokens % model.get_input_embeddings().weight.shape[0], use_cache=False).logits[:, :3]
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
    moved = (logits - logits[0]).abs().amax(dim=(1, 2))
    return float(moved[1]) == 0.0 and not float(moved[2]) <= tolerance


def stock_gradient(
    model: nn.Module, layout: Layout, arena: Arena, batch: Batch, loss: Loss, autocast: torch.dtype | None
) -> Tensor:
    """The model's own gradient of ``loss`` on ``batch``, without checkpointing: flat [P] in the arena's dtype."""
    with evaluating(model, checkpoint=False), without_gradients(layout):
        with precision(layout, autocast):
            value = loss(model, batch)
        value.backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in layout.parameters.values()]
        return torch.cat([part.reshape(-1) for part in parts]).to(arena.dtype)
