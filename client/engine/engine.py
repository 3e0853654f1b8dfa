"""The engine behind the trainer: loads an adapter, turns a logical batch into one clipped sum, gives the adapter back.

After construction nothing that depends on a record raises: a row that is malformed, not finite, or fits no memory
contributes zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.engine.batches import Example, Fit, collate, micro_batches
from client.engine.clipping import check_clipping_norm, clip_and_add
from client.engine.fused import FusedRows
from client.engine.losses import Loss, causal_lm_loss, classification_loss
from client.engine.opacus_rows import OpacusRows
from common.errors import InvalidInput

TASKS = ("causal-lm", "classification")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


class Engine:
    """Per-example-clipped gradient sums of one model. Make it with ``make_engine``."""

    def __init__(self, source: Any, loss: Loss, fit: Fit, *, pad_token_id: int, micro_batch_size: int) -> None:
        self.source, self.loss, self.fit = source, loss, fit
        self.pad_token_id, self.micro_batch_size = pad_token_id, micro_batch_size
        self.layout = source.layout
        self.set_aside = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their ``named_parameters()`` names, in that order."""
        return self.layout.parameters

    @property
    def num_parameters(self) -> int:
        """P, the length of every flat vector."""
        return self.layout.num_parameters

    @property
    def bytes_per_example(self) -> int:
        """Arena bytes that one example in a micro-batch needs."""
        return self.source.arena.bytes_per_example

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy ``arrays`` into the trainable parameters; see ``Layout.load``."""
        self.layout.load(arrays)

    def read(self) -> dict[str, np.ndarray]:
        """Float32 copies of the trainable parameters."""
        return self.layout.read()

    def subtract(self, step: Tensor) -> None:
        """Subtract an optimizer's flat ``step`` [P] from the trainable parameters."""
        self.layout.subtract(step)

    def clipped_sum(self, examples: Sequence[Example], clipping_norm: float) -> Tensor:
        """Σ_i min(1, C/|g_i|) g_i as a flat float32 vector [P]; zeros for an empty draw.

        Raises:
            InvalidInput: ``clipping_norm`` ≤ 0. Never because of a record.
        """
        threshold = check_clipping_norm(clipping_norm)
        total = self.source.arena_vector()

        def add(batch: Any) -> None:
            clip_and_add(self.source.rows(batch, self.loss), threshold, total)

        self._each(examples, add)
        return total[: self.num_parameters].to(torch.float32)

    def plain_sum(self, examples: Sequence[Example]) -> Tensor:
        """Σ_i g_i as a flat float32 vector [P], without clipping: the non-private twin on the same kernels and loss."""
        total = self.source.arena_vector()

        def add(batch: Any) -> None:
            part = torch.zeros_like(total)
            self.source.plain(batch, self.loss, part)
            if not bool(torch.isfinite(part).all()):
                rows = self.source.rows(batch, self.loss)
                part = rows[torch.isfinite(rows).all(1)].sum(0)
            total.add_(part)

        self._each(examples, add)
        return total[: self.num_parameters].to(torch.float32)

    def _each(self, examples: Sequence[Example], add: Callable[[Any], None]) -> None:
        usable = [example for example in examples if self.fit.usable(example)]
        self.set_aside = len(examples) - len(usable)
        tokens = self.micro_batch_size * self.fit.max_length
        for group in micro_batches(usable, rows=8 * self.micro_batch_size, tokens=tokens):
            self._halving(group, add)

    def _halving(self, group: list[Example], add: Callable[[Any], None]) -> None:
        """Run ``group``; on failure run its halves, so that a row which cannot run does not touch its neighbours.

        Failures here are memory: layouts and dtypes were tried by the self-test before data was opened.
        """
        try:
            add(collate(group, pad_token_id=self.pad_token_id, device=self.layout.device))
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            failure = type(error).__name__
        else:
            return
        self.source.arena.release()
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(group) == 1:
            self.set_aside += 1
            log.warning("a record could not be computed (%s) and counts as zero", failure)
            return
        middle = len(group) // 2
        self._halving(group[:middle], add)
        self._halving(group[middle:], add)


def make_engine(
    model: nn.Module,
    *,
    task: str,
    kind: str = "fused",
    micro_batch_size: int | None = None,
    pad_token_id: int,
    max_length: int,
    precision: str = "float32",
    vocabulary_chunk: int | None = None,
) -> Engine:
    """Build an engine for ``model``.

    Args:
        model: a PeftModel on its device; what requires gradients is trained.
        task: ``causal-lm`` or ``classification``.
        kind: ``fused`` (owned layers only, as fast as an ordinary step) or ``opacus`` (slower, more layers).
        micro_batch_size: most examples of maximum length computed at once; None chooses. It never changes the result.
        pad_token_id: fills short rows; padding carries no attention and no label.
        max_length: longest example in tokens; a longer one contributes zero.
        precision: ``float32`` computes in the weights' dtype; ``bfloat16`` and ``float16`` use autocast.
        vocabulary_chunk: causal-lm only: compute logits in pieces of this many entries to save memory.

    Raises:
        InvalidInput: a setting is out of range, or the model holds something the engine does not own.
    """
    if task not in TASKS:
        raise InvalidInput(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if precision not in PRECISIONS:
        raise InvalidInput(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if kind not in ("fused", "opacus"):
        raise InvalidInput(f"engine must be fused or opacus, got {kind!r}")
    if max_length < 1 or (micro_batch_size is not None and micro_batch_size < 1):
        raise InvalidInput(f"max_length and micro_batch_size must be >= 1, got {max_length}, {micro_batch_size}")
    source = (FusedRows if kind == "fused" else OpacusRows)(model, autocast=PRECISIONS[precision])
    if task == "causal-lm":
        loss: Loss = causal_lm_loss(head_is_trained=source.trains_head, chunk=vocabulary_chunk)
    else:
        loss = classification_loss
    vocab_size = model.get_input_embeddings().num_embeddings
    num_labels = int(getattr(model.config, "num_labels", 0) or 0)
    fit = Fit(task=task, vocab_size=vocab_size, num_labels=num_labels, max_length=max_length)
    size = micro_batch_size or max(1, 4096 // max_length)
    return Engine(source, loss, fit, pad_token_id=pad_token_id, micro_batch_size=size)
