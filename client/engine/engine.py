"""The engine behind the trainer: loads an adapter, turns a logical batch into one clipped sum, gives the adapter back.

After construction nothing that depends on a record raises: a row that is malformed, not finite, or fits no memory
contributes zero.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from client.engine.batches import Batch, Bounds, Example, Fit, collate, micro_batches
from client.engine.clipping import Rule, as_rule
from client.engine.dropout import record_seeds
from client.engine.frozen import FrozenBlocks, FrozenStates
from client.engine.fused import FusedRows
from client.engine.layout import Arena, Layout
from client.engine.losses import Loss, causal_lm_loss, check_chunk, classification_loss
from client.engine.opacus_rows import OpacusRows
from client.engine.stock import looks_ahead
from client.engine.stock import precision as in_precision
from common.errors import InvalidInput

TASKS = ("causal-lm", "classification")
PRECISIONS = {
    "float32": None,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
"""Tokens per micro-batch when nobody says: on a CPU what stays in its cache, on a GPU what keeps it busy."""
ARENA_BYTES = 2**28
"""Rows are added to a micro-batch of short examples while the arena stays below this many bytes."""

log = logging.getLogger(__name__)


class RowSource(Protocol):
    """Where rows of per-example gradients come from: ``FusedRows`` or ``OpacusRows``."""

    model: nn.Module
    layout: Layout
    arena: Arena
    autocast: torch.dtype | None
    trains_head: bool
    frozen: FrozenBlocks | None

    def rows(self, batch: Batch, loss: Loss) -> Tensor:
        """Per-example gradients [b, stride]; valid until the next call."""

    def plain(self, batch: Batch, loss: Loss, total: Tensor) -> None:
        """Add their sum to ``total`` [stride]."""

    def stock(self, batch: Batch, loss: Loss) -> Tensor:
        """Their sum [P] by the stock model's own backward pass."""

    def arena_vector(self) -> Tensor:
        """A zero vector [stride] to sum rows into."""


class Engine:
    """Per-example-clipped gradient sums of one model. Make it with ``make_engine``.

    Attributes:
        set_aside: how many records of the last step contributed zero because they were malformed or fitted no memory.
            Private: for the organisation's own eyes.
    """

    def __init__(
        self,
        source: RowSource,
        loss: Loss,
        fit: Fit,
        *,
        pad_token_id: int,
        micro_batch_size: int,
        dropout_secret: bytes | None = None,
    ) -> None:
        self.source, self.loss, self.fit = source, loss, fit
        self.pad_token_id, self.micro_batch_size = pad_token_id, micro_batch_size
        self.layout = source.layout
        most = max(micro_batch_size, min(8 * micro_batch_size, ARENA_BYTES // self.bytes_per_example))
        self.bounds = Bounds(rows=most, tokens=micro_batch_size * fit.max_length)
        self.set_aside = 0
        self._dropout_secret = dropout_secret

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

    def clipped_sum(self, examples: Sequence[Example], clipping_norm: float | Rule) -> Tensor:
        """Σ_i min(1, C/|g_i|) g_i as a flat float32 vector [P]; zeros for an empty draw.

        Args:
            examples: one logical batch; how it is cut into micro-batches never changes the result.
            clipping_norm: C, L2 over all parameters, or another rule of ``client.engine.clipping``.

        Raises:
            InvalidInput: ``clipping_norm`` ≤ 0, or a rule that does not fit the model. Never because of a record.
        """
        return self.clipped_sum_and_bits(examples, clipping_norm)[0]

    def clipped_sum_and_bits(self, examples: Sequence[Example], clipping_norm: float | Rule) -> tuple[Tensor, float]:
        """``clipped_sum``, and Σ_i (b_i − ½) with b_i = 1 where record i was not clipped.

        Both are private until noise is added. A record that contributes nothing to the sum counts 0 in the bits.
        """
        rule, total, bits = as_rule(clipping_norm), self.source.arena_vector(), 0.0
        rule.check(self.layout)

        def add(batch: Batch) -> None:
            nonlocal bits
            part = self.source.arena_vector()
            ratio = rule.add(self.source.rows(batch, self.loss), self.layout, part)
            counted = ratio[torch.isfinite(ratio)]
            more = float((counted <= 1.0).sum()) - 0.5 * len(counted)
            # Last, and at once: a failure above leaves nothing of this batch behind, so that halving adds no row twice.
            total.add_(part)
            bits += more

        self._each(examples, add)
        return total[: self.num_parameters].to(torch.float32), bits

    def plain_sum(self, examples: Sequence[Example]) -> Tensor:
        """Σ_i g_i as a flat float32 vector [P], without clipping: the non-private twin on the same kernels and loss."""
        total = self.source.arena_vector()

        def add(batch: Batch) -> None:
            part = torch.zeros_like(total)
            self.source.plain(batch, self.loss, part)
            if not bool(torch.isfinite(part).all()):
                rows = self.source.rows(batch, self.loss)
                part = rows[torch.isfinite(rows).all(1)].sum(0)
            total.add_(part)

        self._each(examples, add)
        return total[: self.num_parameters].to(torch.float32)

    def batch(self, group: Sequence[Example]) -> Batch:
        """Pad usable examples to one micro-batch on the model's device, with dropout seeds where dropout is on.

        With ``keep_frozen``, and where the states of all of them are kept, they are part of it.
        """
        batch = collate(group, pad_token_id=self.pad_token_id, device=self.layout.device)
        if self.source.frozen is not None:
            batch = replace(batch, states=self.source.frozen.recall(group, self.layout.device))
        if self._dropout_secret is None:
            return batch
        return replace(batch, seeds=record_seeds(self._dropout_secret, group, self.layout.device))

    def keep_frozen(self, states: FrozenStates, *identity: str) -> None:
        """From now on keep what the frozen layers below the first trained one give; see ``client/engine/frozen.py``.

        Args:
            states: where, for this process.
            identity: what makes the frozen layers what they are: the backbone's hash, and how it was changed.

        Raises:
            InvalidInput: there is nothing to keep in this model, or dropout or Opacus is on.
        """
        if not isinstance(self.source, FusedRows) or self._dropout_secret is not None:
            raise InvalidInput("cache-frozen-layers needs the fused engine without dropout")
        kind = f"{self.layout.device.type} {self.source.autocast}"
        self.source.frozen = FrozenBlocks(
            self.source.model, lambda depth: states.of(*identity, kind, f"below block {depth}")
        )

    def prepare(self, examples: Sequence[Example]) -> None:
        """Compute what is to be kept of ``examples`` and is not yet; nothing without ``keep_frozen``.

        A record for which it fails is computed in full whenever it is drawn.
        """
        frozen = self.source.frozen
        if frozen is None:
            return
        lacking = frozen.missing([example for example in examples if self.fit.usable(example)])
        for group in micro_batches(lacking, self.bounds):
            try:
                self.remember(group)
            except Exception as error:
                log.warning("no more states of frozen layers are kept (%s)", type(error).__name__)
                return

    def remember(self, group: Sequence[Example]) -> None:
        """Compute and keep the states of usable examples, all at once; what fails is raised."""
        batch = collate(group, pad_token_id=self.pad_token_id, device=self.layout.device)
        if self.source.frozen is not None:
            with in_precision(self.layout, self.source.autocast):
                self.source.frozen.remember(group, batch)

    def release_memory(self) -> None:
        """Give the arena back; the next step allocates it again."""
        self.source.arena.release()
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()

    def _each(self, examples: Sequence[Example], add: Callable[[Batch], None]) -> None:
        usable = [example for example in examples if self.fit.usable(example)]
        self.set_aside = len(examples) - len(usable)
        if self._dropout_secret is not None:  # a new secret for every step, so that masks are fresh
            self._dropout_secret = hashlib.sha256(b"cloister/dropout/v1" + self._dropout_secret).digest()
        for group in micro_batches(usable, self.bounds):
            self._halving(group, add)

    def _halving(self, group: list[Example], add: Callable[[Batch], None]) -> None:
        """Run ``group``; on failure run its halves, so that a row which cannot run does not touch its neighbours.

        Whatever fails here was tried on public tokens by the self-test, so what is left is memory. No error may pass:
        that a record raised would be seen outside.
        """
        try:
            add(self.batch(group))
        except Exception as error:
            failure, memory = type(error).__name__, isinstance(error, MemoryError | torch.OutOfMemoryError)
        else:
            return
        self.release_memory()  # outside the handler: its traceback would keep the failed graph alive
        if len(group) == 1:
            self.set_aside += 1
            log.warning("a record could not be computed (%s) and counts as zero", failure)
            return
        if memory:
            self.bounds.lower(group)
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
    dropout: bool = False,
    dropout_seed: int | None = None,
) -> Engine:
    """Build an engine for ``model``.

    Args:
        model: a PeftModel on its device; what requires gradients is trained.
        task: ``causal-lm`` or ``classification``.
        kind: ``fused`` (owned layers only, as fast as an ordinary step) or ``opacus`` (slower, more layers).
        micro_batch_size: most examples of maximum length computed at once; None chooses. It never changes the result.
        pad_token_id: fills short rows; padding carries no attention and no label.
        max_length: longest example in tokens; a longer one contributes zero.
        precision: ``float32`` computes in the weights' dtype; ``bf16`` and ``fp16`` use autocast, without a gradient
            scaler (one scale for a batch would let its records touch each other).
        vocabulary_chunk: causal-lm only: compute logits in pieces of this many entries to save memory.
        dropout: use the model's ``nn.Dropout`` and LoRA dropout rates, with masks that belong to each record. Dropout
            inside attention kernels stays off.
        dropout_seed: fixes the masks, for tests; None takes the operating system's randomness.

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
    if dropout and kind != "fused":
        raise InvalidInput("dropout needs the fused engine: Opacus would draw one mask for the whole batch")
    source: RowSource = (FusedRows if kind == "fused" else OpacusRows)(model, autocast=PRECISIONS[precision])
    secret = None
    if dropout:
        secret = os.urandom(32) if dropout_seed is None else f"seeded {dropout_seed}".encode()
    return Engine(
        source,
        _loss(task, source, vocabulary_chunk),
        _fit(model, task, pad_token_id, max_length),
        pad_token_id=pad_token_id,
        micro_batch_size=micro_batch_size or max(1, TOKENS_AT_ONCE.get(source.layout.device.type, 512) // max_length),
        dropout_secret=secret,
    )


def _loss(task: str, source: RowSource, chunk: int | None) -> Loss:
    if task == "classification":
        if chunk is not None:
            raise InvalidInput("vocabulary_chunk is for causal-lm; a classifier has no vocabulary of outputs")
        return classification_loss
    if source.model.get_output_embeddings() is None:
        raise InvalidInput(f"{type(source.model).__name__} has no language-model head; use AutoModelForCausalLM")
    if looks_ahead(source.model):
        raise InvalidInput("the model's attention looks ahead, so it is no causal language model; set is_decoder=True")
    if chunk is not None:
        check_chunk(source.model, chunk, source.trains_head)
    return causal_lm_loss(head_is_trained=source.trains_head, chunk=chunk)


def _fit(model: nn.Module, task: str, pad_token_id: int, max_length: int) -> Fit:
    """Public facts that decide which examples can be computed on.

    Raises:
        InvalidInput: the model cannot do the task, or would read its classification at a padded position.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidInput("encoder-decoder models are not supported; use a decoder or an encoder")
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    if not 0 <= pad_token_id < vocab_size:
        raise InvalidInput(f"pad_token_id {pad_token_id} is not in the vocabulary of {vocab_size}")
    num_labels = int(getattr(config, "num_labels", 0) or 0)
    if task == "classification" and num_labels < 2:
        raise InvalidInput(f"classification needs a model with at least 2 labels, this one has {num_labels}")
    if task == "classification" and config.pad_token_id != pad_token_id:
        raise InvalidInput(
            f"the model's padding token is {config.pad_token_id}, the data's is {pad_token_id}: a classifier may look "
            "for the last token by it; set model.config.pad_token_id"
        )
    return Fit(task=task, vocab_size=vocab_size, num_labels=num_labels, max_length=max_length)
