"""Per-example gradients in the ordinary backward pass: for its duration the owned layers get the engine's forward.

The model is left as found: forwards, training flags, requires_grad and hooks are put back after every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from client.engine.batches import Batch
from client.engine.discovery import find_sites, refuse_coupling
from client.engine.frozen import FrozenBlocks
from client.engine.layout import Arena, Layout
from client.engine.losses import Loss
from client.engine.sites import Frame
from client.engine.stock import evaluating, precision, put_back, stock_gradient, without_gradients
from common.errors import InvalidInput


class FusedRows:
    """Rows of per-example gradients of ``model`` through fused LoRA sites.

    Args:
        model: a PeftModel on its device.
        autocast: compute dtype for ``torch.autocast``, or None to compute in the weights' own dtype.

    Raises:
        InvalidInput: the model holds something the engine does not own; the message names it.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        refuse_coupling(model)
        self.model, self.autocast = model, autocast
        self.layout = Layout(model)
        self.arena = Arena(self.layout)
        self.frame = Frame(self.layout, self.arena)
        self.sites = find_sites(model, self.frame)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        inside = {id(module) for module in head.modules()} if isinstance(head, nn.Module) else set()
        self.dropouts = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and module.p > 0.0 and "lora_dropout" not in name.split(".")
        ]
        self.frozen: FrozenBlocks | None = None
        self.trains_head = any(id(site.module) in inside for site in self.sites)

    def arena_vector(self) -> Tensor:
        """A zero vector [stride] of the arena's dtype, to sum rows into."""
        return self.arena.vector()

    def rows(self, batch: Batch, loss: Loss) -> Tensor:
        """Per-example gradients [b, stride]; valid until the next call.

        Raises:
            InvalidInput: a module was reached with an unknown layout, or a gradient arrived outside the sites.
        """
        self.arena.begin(batch.size, self.layout.slots)
        self._run(batch, loss, total=None)
        return self.arena.finish()

    def plain(self, batch: Batch, loss: Loss, total: Tensor) -> None:
        """Add the sum over examples of their gradients to ``total`` [stride]: the non-private twin's kernels."""
        self._run(batch, loss, total=total)

    def stock(self, batch: Batch, loss: Loss) -> Tensor:
        """The model's own gradient of the same loss, without the engine's sites: flat [P], for the self-test."""
        return stock_gradient(self.model, self.layout, self.arena, batch, loss, self.autocast)

    def _run(self, batch: Batch, loss: Loss, total: Tensor | None) -> None:
        frame = self.frame
        frame.batch_size, frame.length, frame.total, frame.seeds = batch.size, batch.length, total, batch.seeds
        with self._installed(batch.states):
            with precision(self.layout, self.autocast):
                value = loss(self.model, batch)
            if value.requires_grad:
                value.backward()
            stray = [name for name, parameter in self.layout.parameters.items() if parameter.grad is not None]
        if stray:
            raise InvalidInput(
                f'{stray[0]} got a gradient outside the engine\'s sites; freeze it or use engine="opacus"'
            )

    @contextmanager
    def _installed(self, states: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_gradients(self.layout))
            if _reentrant(self.model):
                hook = self.model.get_input_embeddings().register_forward_hook(_require_gradient)
                stack.callback(hook.remove)
            for site in self.sites:
                stack.callback(put_back, site.module, site.module.__dict__.get("forward"))
                site.module.forward = site.forward
            for name, module in self.dropouts if self.frame.seeds is not None else ():
                stack.callback(put_back, module, module.__dict__.get("forward"))
                module.forward = partial(self.frame.drop, name, module.p)
            if states is not None and self.frozen is not None:
                stack.enter_context(self.frozen.skipped(states))
            yield


def _reentrant(model: nn.Module) -> bool:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
    return False


def _require_gradient(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_(True) if output.is_leaf else output
