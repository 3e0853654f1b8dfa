"""What trainer, tests and audits call: one private step, also with adaptive clipping, and the clipped sum alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from client.engine.adaptive import AdaptiveClipping
from client.engine.batches import Batch, Example
from client.engine.clipping import FlatClipping, Rule, as_rule, check_clipping_norm, sound_noise_std
from client.engine.engine import Engine
from client.engine.fused import FusedRows
from client.engine.losses import causal_lm_loss, classification_loss
from client.engine.noise import NoiseSource, grid_step
from client.engine.stock import looks_ahead
from common.errors import InvalidInput


def private_step(
    engine: Engine,
    examples: Sequence[Example],
    *,
    clipping_norm: float | Rule,
    noise_multiplier: float,
    expected_batch_size: float,
    noise: NoiseSource,
) -> Tensor:
    """One release of the Poisson-sampled Gaussian mechanism: (Σ_i min(1, C/|g_i|) g_i + N(0, (σC)²)) / expected batch.

    Args:
        engine: with the current adapter loaded.
        examples: this step's Poisson draw; may be empty, then the release is noise alone.
        clipping_norm: C, L2, or a rule (``GroupClipping``, ``ShapedClipping``) that brings its own noise allocation.
        noise_multiplier: σ > 0.
        expected_batch_size: the declared constant, never the draw's size.
        noise: the reservation's source.

    Returns:
        Flat float32 [P] on the CPU, in the order of ``engine.parameters``; see ``release`` for its grid.

    Raises:
        InvalidInput: a public setting is out of range. Never because of a record.
    """
    _positive(noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)
    rule = as_rule(clipping_norm)
    std = sound_noise_std(rule, engine.layout, noise_multiplier)
    total = engine.clipped_sum(examples, rule)
    return torch.from_numpy(release(total.to("cpu", torch.float64).numpy(), std, expected_batch_size, noise))


def adaptive_step(
    engine: Engine,
    examples: Sequence[Example],
    *,
    clipping_norm: float,
    settings: AdaptiveClipping,
    noise_multiplier: float,
    expected_batch_size: float,
    noise: NoiseSource,
    make_rule: Callable[[float], Rule] = FlatClipping,
) -> tuple[Tensor, float]:
    """A private step that also releases the noised unclipped fraction, and moves C by it (DESIGN §4.5).

    Both releases together cost one Gaussian of ``noise_multiplier``: the gradient gets the larger z_Δ in its place.
    One record moves the sum by at most C (in the rule's own norm) and the centred count by ½; whitened by the noise's
    standard deviations z_Δ·C and σ_b, the pair moves by at most √(z_Δ⁻² + (2σ_b)⁻²) = 1/z. C is fixed within the step
    and follows released counts only, so steps compose as if C were constant.

    Args:
        engine: as in ``private_step``, and so are examples, noise_multiplier, expected_batch_size and noise.
        examples: this step's draw.
        clipping_norm: this step's C.
        settings: the public settings of the adaptation.
        noise_multiplier: z, what the step is charged at.
        expected_batch_size: the declared constant.
        noise: the reservation's source.
        make_rule: from C to the rule; flat clipping by default.

    Returns:
        The noised mean gradient, float32 [P], and the next step's C. C is private to this organisation.

    Raises:
        InvalidInput: a public setting is out of range, or noise_multiplier ≥ 2·count_noise.
    """
    _positive(noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)
    multiplier = settings.gradient_noise_multiplier(noise_multiplier)
    rule = make_rule(clipping_norm)
    std = sound_noise_std(rule, engine.layout, multiplier)
    total, bits = engine.clipped_sum_and_bits(examples, rule)
    gradient = release(total.to("cpu", torch.float64).numpy(), std, expected_batch_size, noise)
    count = release(np.array([bits]), settings.count_noise, expected_batch_size, noise)
    return torch.from_numpy(gradient), settings.next(clipping_norm, 0.5 + float(count[0]))


def release(
    total: np.ndarray, noise_std: float | np.ndarray, expected_batch_size: float, noise: NoiseSource
) -> np.ndarray:
    """(total + N(0, noise_std²)) / expected_batch_size in float64, rounded to the public grid, as float32.

    Every entry is a multiple of ``grid_step(noise_std / expected_batch_size)``, as far as float32's 24 bits hold it (up
    to 256 standard deviations exactly; beyond that, rounding to float32 is a coarser public grid).
    """
    drawn = (total + noise_std * noise.normal(total.shape)) / expected_batch_size
    step = grid_step(noise_std / expected_batch_size)
    return (np.rint(drawn / step) * step).astype(np.float32)


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
    rule = FlatClipping(check_clipping_norm(clipping_norm))
    source = FusedRows(model)
    labels = batch["labels"]
    loss = causal_lm_loss(head_is_trained=source.trains_head) if labels.ndim == 2 else classification_loss
    total = source.arena_vector()
    if labels.shape[0]:
        mask = batch.get("attention_mask")
        if mask is not None and labels.ndim == 2 and _padded_right(mask) and not looks_ahead(model):
            mask = None  # as in ``collate``
        found = Batch(batch["input_ids"], mask, labels)
        rule.add(source.rows(found, loss), source.layout, total)
    return source.layout.unflatten(total[: source.layout.num_parameters].to(torch.float32))


def _padded_right(mask: Tensor) -> bool:
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _positive(**named: float) -> None:
    for name, value in named.items():
        if not 0.0 < value < float("inf"):
            raise InvalidInput(f"{name} must be > 0 and finite, got {value}")
