"""The arms of benchmarks/engine.py: a model and a batch of made-up tokens, and one training step per way of taking it.

An arm is built once per case and returns a function that does one step: forward, backward, clipping, noise where there
is any, and the optimizer's update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from client.engine import Adam, FlatClipping, NoiseSource
from client.engine.batches import IGNORED, Batch
from client.engine.fused import FusedRows
from client.engine.losses import causal_lm_loss
from client.engine.step import release

CLIPPING_NORM = 1.0
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One shape. ``labels``: share of positions with a label. ``full_stock``: stock computes all logits, as usual."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    rank: int
    targets: tuple[str, ...]
    labels: float = 1.0
    full_stock: bool = False
    checkpoint: bool = False
    dtype: torch.dtype = torch.float32
    peers: bool = True


# Models and batches


def build(case: Case, device: str) -> nn.Module:
    """A random-weight Llama of the case's shape with a LoRA adapter whose B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.inner, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, max_position_embeddings=case.length,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.set_default_dtype(case.dtype)  # a 7B model is never held in float32
        try:
            backbone = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model = get_peft_model(backbone, LoraConfig(r=case.rank, lora_alpha=16, target_modules=list(case.targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if case.checkpoint:
        enable = getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train() if case.checkpoint else model.eval()


def made_up(case: Case, device: str) -> Batch:
    """A batch of random tokens without padding; the last ``labels`` share of each row carries labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, case.vocab, (case.batch, case.length), generator=generator)
    labels = ids.clone()
    labels[:, : round(case.length * (1 - case.labels))] = IGNORED
    return Batch(ids.to(device), None, labels.to(device))


def full_loss(model: nn.Module, batch: Batch) -> Tensor:
    """All logits, each example's mean, summed: what a stock trainer computes."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    targets = F.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return (each.view(targets.shape).sum(1) / (targets != IGNORED).sum(1)).sum()


# Arms: each returns a function that does one step


def stock_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """Stock peft and torch's AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = full_loss if case.full_stock else causal_lm_loss(head_is_trained=False)

    def step() -> None:
        optimizer.zero_grad()
        (loss(model, batch) / case.batch).backward()
        optimizer.step()

    return step


def fused_arm(model: nn.Module, batch: Batch, case: Case, *, private: bool) -> Step:
    """The engine's kernels; ``private`` clips each row, adds noise and rounds, the twin does not."""
    source, optimizer, rule = FusedRows(model), Adam(1e-4), FlatClipping(CLIPPING_NORM)
    loss, noise, size = (
        causal_lm_loss(head_is_trained=False),
        NoiseSource.fresh("benchmark"),
        source.layout.num_parameters,
    )

    def step() -> None:
        total = source.arena_vector()
        if private:
            rule.add(source.rows(batch, loss), source.layout, total)
            released = release(total[:size].to("cpu", torch.float64).numpy(), CLIPPING_NORM, case.batch, noise)
            gradient = torch.from_numpy(released).to(total.device)
        else:
            source.plain(batch, loss, total)
            gradient = total[:size] / case.batch
        source.layout.subtract(optimizer(gradient))

    return step


def private_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """The engine as it is used."""
    return fused_arm(model, batch, case, private=True)


def twin_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """The same kernels without privacy."""
    return fused_arm(model, batch, case, private=False)


def _each_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    targets = batch.labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return each.mean(1)


def opacus_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """Opacus's hooks, flat clipping and normal_ noise, its own way."""
    from opacus import GradSampleModule

    model.train()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        _each_loss(wrapped, batch).sum().backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
        factors = (CLIPPING_NORM / (norms + 1e-6)).clamp(max=1.0)
        for p in parameters:
            p.grad = torch.einsum("i,i...", factors, p.grad_sample)
            p.grad.add_(torch.randn_like(p.grad), alpha=CLIPPING_NORM).div_(case.batch)
            p.grad_sample = None
        optimizer.step()

    return step


def ghost_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """Opacus's ghost clipping: norms in one backward pass, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model.train()
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses = _each_loss(wrapped, batch)
        losses.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (losses * factors).sum().backward()
        wrapped.enable_hooks()
        for p in parameters:
            p.grad.add_(torch.randn_like(p.grad), alpha=CLIPPING_NORM).div_(case.batch)
        optimizer.step()

    return step


def vmap_arm(model: nn.Module, batch: Batch, case: Case) -> Step:
    """torch.func: vmap over grad, with an explicit mask (a padding mask does not go through vmap)."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    mask = torch.full((case.length, case.length), torch.finfo(torch.float32).min).triu(1)[None, None]

    def one(values: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        settings = {"input_ids": ids[None], "attention_mask": mask, "use_cache": False}
        logits = torch.func.functional_call(model, values, (), settings).logits[0]
        return F.cross_entropy(logits[:-1], labels[1:])

    rows = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    def step() -> None:
        optimizer.zero_grad()
        values = {name: p.detach() for name, p in zip(names, parameters, strict=True)}
        found = rows(values, batch.input_ids, batch.labels)
        norms = torch.stack([found[name].flatten(1).norm(dim=1) for name in names]).norm(dim=0)
        factors = (CLIPPING_NORM / norms).clamp(max=1.0)
        for name, p in zip(names, parameters, strict=True):
            p.grad = torch.einsum("i,i...", factors, found[name])
            p.grad.add_(torch.randn_like(p.grad), alpha=CLIPPING_NORM).div_(case.batch)
        optimizer.step()

    return step


ARMS = {"stock": stock_arm, "stock again": stock_arm, "twin": twin_arm, "private": private_arm}
PEERS = {"opacus hooks": opacus_arm, "opacus ghost": ghost_arm, "vmap": vmap_arm}
