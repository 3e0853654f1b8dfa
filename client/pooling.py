"""Mean and attention pooling inside a stock BERT classifier, for encoders whose first token never stood for a text.

Sentence encoders are trained on the mean of their token states; ``BertForSequenceClassification`` reads the first
token through a pooler. With ``pooling = "mean"`` the last encoder block is replaced by one that averages: queries are
zero, so attention is uniform over the tokens that are not padding; values pass unchanged; the residual is outweighed;
the feed-forward part adds nothing. What the classifier reads is then the layer-normalised mean of the states below,
through a pooler of 0.5·x and tanh.

``pooling = "attention"`` starts as the mean and learns where to look: keys are the states themselves, and one query per
head, the bias of the query projection, is trained from zero (as many numbers as the model is wide). Averages over all
tokens become averages over those that matter (Yang et al. 2016, "Hierarchical attention networks", §2.2).

The replaced block and the pooler are otherwise constants: public, frozen, saved with the adapter (``modules_to_save``),
so that ``PeftModel.from_pretrained`` on the stock class and the unchanged backbone folder gives the same classifier.
On SST-2, without privacy, a linear head reads .74 from the first token of all-MiniLM-L6-v2, .81 from the mean and .82
from a learned average (benchmarks/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch

from common.errors import InvalidInput

OUTWEIGHS = 64.0
"""Factor on the mean of the values: the first token's own state is one part in this many."""

POOLER_SCALE = 0.5
"""Keeps tanh near its linear part for layer-normalised states."""


LEARNED_QUERY = "attention.self.query.bias"
"""What attention pooling trains, inside the replaced block."""


def replaced_modules(model: Any) -> tuple[str, str]:
    """Names, inside ``model``, of the block that is replaced and of the pooler.

    Raises:
        InvalidInput: the model is not a BERT sequence classifier.
    """
    bert = getattr(model, "bert", None)
    if model.config.model_type != "bert" or bert is None or bert.pooler is None:
        raise InvalidInput(
            f"mean and attention pooling are for BERT classifiers, this is {model.config.model_type}: "
            "use pooling = first"
        )
    return f"layer.{len(bert.encoder.layer) - 1}", "pooler"


@torch.no_grad()
def average_tokens(model: Any, *, attend: bool = False) -> None:
    """Set the last block and the pooler of a BERT sequence classifier to the averaging constants, in place.

    Args:
        model: the classifier.
        attend: make keys of the states, so that a query other than zero weighs the tokens by (query · state) per head.
    """
    replaced_modules(model)
    block, pooler = model.bert.encoder.layer[-1], model.bert.pooler
    attention = block.attention
    for linear in (attention.self.query, attention.self.key, block.intermediate.dense, block.output.dense):
        linear.weight.zero_()
        linear.bias.zero_()
    if attend:  # undoes the division of scores by the root of the head's width
        _scaled_identity(attention.self.key, (model.config.hidden_size / model.config.num_attention_heads) ** 0.5)
    _scaled_identity(attention.self.value, 1.0)
    _scaled_identity(attention.output.dense, OUTWEIGHS)
    for norm in (attention.output.LayerNorm, block.output.LayerNorm):
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    _scaled_identity(pooler.dense, POOLER_SCALE)


def _scaled_identity(linear: torch.nn.Linear, scale: float) -> None:
    torch.nn.init.eye_(linear.weight)
    linear.weight.mul_(scale)
    linear.bias.zero_()
