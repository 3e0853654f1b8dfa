"""Examples, and how a logical batch is cut into physical micro-batches.

Guarantee: cutting, sorting and padding change no example's gradient, and no example can raise: one that is malformed
contributes zero. Sorting by length happens inside one logical batch only; the clipped sum does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One record as tokens.

    Attributes:
        input_ids: integers (T,), without padding.
        labels: for causal-lm integers (T,), ``-100`` where the loss ignores a token, *not* shifted (the model shifts);
            for classification the class id.
    """

    input_ids: np.ndarray
    labels: np.ndarray | int


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch on the model's device.

    Attributes:
        input_ids: [b, T]; attention_mask: [b, T] of 0 and 1, or None when none is needed.
        labels: [b, T] with -100, or class ids [b].
        seeds: [b] 64-bit integers that each record's dropout masks follow from; None switches dropout off.
        states: [b, T, width] what enters the first trained block, where it is kept (``client/engine/frozen.py``).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    seeds: Tensor | None = None
    states: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples b."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Padded length T."""
        return self.input_ids.shape[1]


@dataclass(frozen=True, slots=True)
class Fit:
    """What a usable example looks like: public facts of model and task."""

    task: str
    vocab_size: int
    num_labels: int
    max_length: int

    def usable(self, example: Example) -> bool:
        """Whether the example can be computed on: integer tokens in range, 1 to max_length of them, and a target."""
        try:
            ids = np.asarray(example.input_ids)
            labels = np.asarray(example.labels)
            if ids.ndim != 1 or not 1 <= ids.size <= self.max_length or ids.dtype.kind not in "iu":
                return False
            if labels.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.vocab_size:
                return False
            if self.task == "classification":
                return labels.ndim == 0 and 0 <= int(labels) < self.num_labels
            if labels.shape != ids.shape:
                return False
            counted = labels[1:][labels[1:] != IGNORED]
            return counted.size > 0 and bool(counted.min() >= 0 and counted.max() < self.vocab_size)
        except (TypeError, ValueError, AttributeError, OverflowError):
            return False


@dataclass(slots=True)
class Bounds:
    """How large a micro-batch may be; lowered when memory runs out, which changes no result.

    Attributes:
        rows: most examples.
        tokens: most padded tokens; one example always passes.
    """

    rows: int
    tokens: int

    def lower(self, group: Sequence[Example]) -> None:
        """Remember that ``group`` did not fit: half of its tokens is the bound from now on."""
        longest = max(len(example.input_ids) for example in group)
        self.tokens = min(self.tokens, max(longest, len(group) // 2 * longest))


def micro_batches(examples: Sequence[Example], bounds: Bounds) -> Iterator[list[Example]]:
    """Cut usable examples of one logical batch into runs of similar length, longest first (memory peaks at the start).

    ``bounds`` is read anew for every run.
    """
    ordered = sorted(examples, key=lambda e: -len(e.input_ids))
    start = 0
    while start < len(ordered):
        longest = len(ordered[start].input_ids)
        count = max(1, min(bounds.rows, bounds.tokens // longest))
        yield ordered[start : start + count]
        start += count


def collate(examples: Sequence[Example], *, pad_token_id: int, device: torch.device) -> Batch:
    """Pad on the right to the longest of ``examples``; padding carries no label and no attention.

    A causal model never looks to the right, so it gets no mask: its attention is faster without one, and with a sliding
    window a padded position whose keys are all masked would be 0/0 in some models.
    """
    longest = max(len(e.input_ids) for e in examples)
    ids = np.full((len(examples), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    causal = np.ndim(examples[0].labels) == 1
    labels = np.full((len(examples), longest) if causal else (len(examples),), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = example.input_ids
        mask[row, :size] = 1
        if causal:
            labels[row, :size] = example.labels
        else:
            labels[row] = int(example.labels)
    attention = None if causal or mask.all() else torch.from_numpy(mask).to(device)
    return Batch(torch.from_numpy(ids).to(device), attention, torch.from_numpy(labels).to(device))
