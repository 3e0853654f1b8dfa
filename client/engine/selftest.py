"""What is tried on made-up public tokens before any record is read, so that afterwards no record can cause an error.

Guarantee: parameters are as before when the test returns or raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from client.engine.batches import Example
from client.engine.engine import Engine
from client.engine.losses import causal_lm_loss
from common.errors import InvalidInput

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
"""Relative differences that rounding alone may cause; a record that touches another one causes far more."""


def self_test(engine: Engine, *, seed: int = 0) -> None:
    """Try the engine on made-up tokens.

    Checks, in this order: one example of maximum length fits; two runs agree (no dropout outside the engine); the rows
    add up to what the stock model's own backward pass gives; every owned layer's A and B move (B perturbed, since at
    B = 0 only B can move); a row does not change when its neighbours do, nor when its frozen layers are kept.

    Raises:
        InvalidInput: names the module and the way out.
    """
    with _perturbed(engine, seed):
        examples = _made_up(engine, seed, engine.fit.max_length)
        longest = _rows(engine, examples[:1], "one example of maximum length")
        if not torch.equal(longest, _rows(engine, examples[:1], "one example")):
            raise InvalidInput(
                "two identical runs differ: the model draws randomness the engine does not own; "
                "set its dropout settings to 0 in the configuration"
            )
        rows = _rows(engine, examples, "three examples")
        _check_sum(engine, _made_up(engine, seed, min(16, engine.fit.max_length)))
        _check_sites(engine, rows)
        _check_neighbours(engine, examples, rows, longest[0])
        _check_frozen(engine, examples, rows)


def _made_up(engine: Engine, seed: int, top: int) -> list[Example]:
    """Three public examples of up to ``top`` tokens; no batch size equals a length unless ``top`` is 3."""
    rng = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate((top, max(2, top // 2), max(2, top - 1))):
        ids = rng.integers(0, engine.fit.vocab_size, min(length, top))
        ids[ids == engine.pad_token_id] = (engine.pad_token_id + 1) % engine.fit.vocab_size
        causal = engine.fit.task == "causal-lm"
        examples.append(Example(ids, ids.copy() if causal else row % engine.fit.num_labels))
    return examples


def _rows(engine: Engine, examples: list[Example], what: str, *, dropout: bool = True) -> Tensor:
    batch = engine.batch(examples) if dropout else replace(engine.batch(examples), seeds=None)
    try:
        rows = engine.source.rows(batch, engine.loss)
        return rows[:, : engine.num_parameters].clone()
    except InvalidInput:
        raise
    except (RuntimeError, MemoryError, ValueError, IndexError, TypeError) as error:
        size = engine.bytes_per_example / 2**20
        raise InvalidInput(
            f"{what} ({batch.size} x {batch.length} made-up tokens, {size:.1f} MiB of gradient rows each) fails: "
            f"{error}; lower max_length or the rank, use gradient checkpointing, or a smaller backbone"
        ) from error


def _tolerance(engine: Engine) -> float:
    weights = {p.dtype for p in engine.source.model.parameters() if p.is_floating_point()}
    kinds = weights | ({engine.source.autocast} if engine.source.autocast else set())
    return max(TOLERANCE.get(kind, 0.2) for kind in kinds)


def _differ(left: Tensor, right: Tensor) -> float:
    scale = max(float(left.norm()), float(right.norm()))
    return float((left - right).norm()) / scale if scale > 0 else 0.0


def _check_sum(engine: Engine, examples: list[Example]) -> None:
    """The stock model keeps all activations and logits, so ``examples`` are short; it knows no masks: no dropout."""
    rows = _rows(engine, examples, "three examples", dropout=False)
    causal = engine.fit.task == "causal-lm"
    whole = causal_lm_loss(head_is_trained=engine.source.trains_head) if causal else engine.loss
    stock = engine.source.stock(engine.batch(examples), whole)
    for name, slot in engine.layout.slots.items():
        part = slice(slot.offset, slot.offset + slot.size)
        wrong = _differ(rows.sum(0)[part], stock[part])
        # A gradient far below the rest (a key's bias) is rounding alone; measure it against the whole.
        small = float(stock[part].norm()) < 1e-3 * float(stock.norm())
        if not (wrong <= _tolerance(engine) or small):
            raise InvalidInput(
                f"{name}: the per-example gradients do not add up to the model's own gradient "
                f'(relative difference {wrong:.2g}); take the module out of target_modules or use engine = "opacus"'
            )


def _check_sites(engine: Engine, rows: Tensor) -> None:
    for name, slot in engine.layout.slots.items():
        moved = bool(rows[:, slot.offset : slot.offset + slot.size].any())
        if not moved and not name.endswith("bias"):
            raise InvalidInput(
                f"{name} does not change in a training step: its layer is not reached or gets no gradient; "
                "take it out of target_modules, or with reentrant checkpointing use use_reentrant=False"
            )


def _check_neighbours(engine: Engine, examples: list[Example], rows: Tensor, alone: Tensor) -> None:
    rng = np.random.default_rng(1)
    first = examples[0]
    loud = rng.integers(0, engine.fit.vocab_size, engine.fit.max_length)
    other = Example(loud, loud if engine.fit.task == "causal-lm" else engine.fit.num_labels - 1)
    for row in (rows[0], _rows(engine, [first, other, other, other], "four examples")[0]):
        moved = _differ(row, alone)
        if not moved <= _tolerance(engine):
            raise InvalidInput(
                f"a record's gradient changes with its neighbours in the batch (relative {moved:.2g}): some layer lets "
                "records touch each other (batch statistics, expert capacity, dynamic scales); use another backbone"
            )


def _check_frozen(engine: Engine, examples: list[Example], rows: Tensor) -> None:
    frozen = engine.source.frozen
    if frozen is None:
        return
    engine.remember(examples)
    try:
        kept = _rows(engine, examples, "three examples from kept states")
    finally:
        frozen.forget(examples)
    wrong = _differ(kept, rows)
    if not wrong <= _tolerance(engine):
        raise InvalidInput(
            f"cache-frozen-layers: gradients from kept states are not those of the whole model (relative difference "
            f"{wrong:.2g}): its layers are not a plain chain; leave the option out"
        )


@contextmanager
def _perturbed(engine: Engine, seed: int) -> Iterator[None]:
    """Add small public noise to every trainable parameter, and take it away again."""
    kept = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in engine.parameters.values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.02 * noise.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in engine.parameters.items():
                parameter.copy_(kept[name])
