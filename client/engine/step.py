"""The two public functions of the engine that tests and audits call: one private step, and the clipped sum alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from client.engine.batches import Batch, Example
from client.engine.clipping import check_clipping_norm, clip_and_add
from client.engine.engine import Engine
from client.engine.fused import FusedRows
from client.engine.losses import causal_lm_loss, classification_loss
from client.engine.noise import NoiseSource, grid_step
from common.errors import InvalidInput


def private_step(
    engine: Engine,
    examples: Sequence[Example],
    *,
    clipping_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    noise: NoiseSource,
) -> Tensor:
    """One release of the Poisson-sampled Gaussian mechanism: (Σ_i min(1, C/|g_i|) g_i + N(0, (σC)²)) / expected batch.

    Args:
        engine: with the current adapter loaded.
        examples: this step's Poisson draw; may be empty, then the release is noise alone.
        clipping_norm: C, L2.
        noise_multiplier: σ > 0.
        expected_batch_size: the declared constant, never the draw's size.
        noise: the reservation's source.

    Returns:
        Flat float32 [P] on the CPU, in the order of ``engine.parameters``, every entry a multiple of
        ``grid_step(σC / expected_batch_size)`` as far as float32 can hold it.

    Raises:
        InvalidInput: a public setting is out of range. Never because of a record.
    """
    for name, value in (("noise_multiplier", noise_multiplier), ("expected_batch_size", expected_batch_size)):
        if not 0.0 < value < float("inf"):
            raise InvalidInput(f"{name} must be > 0 and finite, got {value}")
    noise_std = noise_multiplier * check_clipping_norm(clipping_norm)
    total = engine.clipped_sum(examples, clipping_norm).to("cpu", torch.float64).numpy()
    released = (total + noise_std * noise.normal(total.shape)) / expected_batch_size
    step = grid_step(noise_std / expected_batch_size)
    return torch.from_numpy((np.rint(released / step) * step).astype(np.float32))


def clipped_gradient_sum(model: nn.Module, batch: Mapping[str, Tensor], *, clipping_norm: float) -> dict[str, Tensor]:
    """Σ_i min(1, C/|g_i|) g_i over the rows of one batch: undivided, without noise.

    Each example's loss is the mean over its own completion tokens (labels -100 are ignored, the model shifts). A row
    without such a token, or whose gradient is not finite, contributes zero. Dropout is off. The model is left as found.

    Args:
        model: a plain PeftModel; a causal language model where labels are [b, T], a classifier where they are [b].
        batch: ``input_ids`` [b, T], ``labels``, and optionally ``attention_mask`` [b, T].
        clipping_norm: C, L2 over all trainable parameters together.

    Returns:
        Float32 tensors by the names of ``named_parameters()`` that require gradients.

    Raises:
        InvalidInput: C ≤ 0, or something trainable is not owned by the fused engine.
    """
    threshold = check_clipping_norm(clipping_norm)
    labels = batch["labels"]
    rows = FusedRows(model)
    causal = labels.ndim == 2
    loss = causal_lm_loss(head_is_trained=rows.trains_head) if causal else classification_loss
    total = rows.arena_vector()
    if labels.shape[0]:
        found = Batch(batch["input_ids"], batch.get("attention_mask"), labels)
        clip_and_add(rows.rows(found, loss), threshold, total)
    flat = total[: rows.layout.num_parameters].to(torch.float32)
    return rows.layout.unflatten(flat)
