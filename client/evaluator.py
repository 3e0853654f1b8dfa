"""Scores an adapter on a *public* set: nothing here may be given private records.

In a deployment it is the trainer's image run on the coordinator's side without private data; in a simulation it runs
in the same process. The score is accuracy for classification and next-token accuracy on completion tokens otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from client.adapter import set_arrays
from client.engine.batches import Example, collate
from common.messages import Arrays


@dataclass(frozen=True)
class Evaluation:
    """What a public set says of an adapter.

    Attributes:
        score: accuracy in [0, 1], higher is better.
        loss: mean cross-entropy in nats, per example (classification) or per completion token.
        count: examples or completion tokens behind them.
    """

    score: float
    loss: float
    count: int


class Evaluator:
    """Evaluates the global adapter on public examples, on the model it is given.

    ``hold`` puts an adapter into the model; by default its arrays are the model's trained tensors.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        *,
        pad_token_id: int,
        batch_size: int = 64,
        hold: Callable[[Arrays], None] | None = None,
    ) -> None:
        self._model = model
        self._hold = hold or partial(set_arrays, model)
        # Sorted by length once: padding is what evaluation costs.
        self._examples = sorted(examples, key=lambda example: len(example.input_ids))
        self._pad_token_id = pad_token_id
        self._batch_size = batch_size

    def __call__(self, adapter: Arrays) -> Evaluation:
        """Score ``adapter``; the model holds it afterwards."""
        self._hold(adapter)
        return self.current()

    @torch.no_grad()
    def current(self) -> Evaluation:
        """Score the model as it stands."""
        device = next(self._model.parameters()).device
        right = count = 0
        loss = 0.0
        was_training = self._model.training
        self._model.eval()
        for start in range(0, len(self._examples), self._batch_size):
            group = self._examples[start : start + self._batch_size]
            batch = collate(group, pad_token_id=self._pad_token_id, device=device)
            labels = batch.labels
            with _one_precision(self._model, device):
                logits = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
            if labels.dim() == 2:
                kept = labels[:, 1:] != -100
                logits, labels = logits[:, :-1][kept], labels[:, 1:][kept]
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += labels.numel()
        self._model.train(was_training)
        return Evaluation(right / count, loss / count, count)


def _one_precision(model: Any, device: torch.device) -> AbstractContextManager[object]:
    """As in training, bf16 weights compute under autocast: what is trained beside them stays in float32."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=len(kinds) > 1 and torch.bfloat16 in kinds)
