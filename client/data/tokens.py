r"""Rows to token ids, with a count of what had to be cut or set aside; the counts are for the organisation only.

A language record is ``<bos> prompt \n completion <eos>`` and its loss is taken on the completion. A record that is
longer than the context is cut at its end; one that is left without a completion token is set aside here, before
round 1, so that no record can cause an error after sampling (docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from client.data.rows import (
    COMPLETION_NAMES,
    LABEL_NAMES,
    PROMPT_NAMES,
    TEXT_NAMES,
    ColumnNames,
    Row,
    column,
)
from client.engine.batches import Example
from common.errors import InvalidInput

IGNORED = -100
"""The label of a position without loss, as in transformers."""

SEPARATOR = "\n"
"""Stands between prompt and completion; ``cloister generate`` adds it too."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised records of one silo.

    Attributes:
        examples: what is trained on. truncated: records that were cut. set_aside: records without a completion token.
        Both counts are facts about private data: they are shown to the organisation and leave in no message.
    """

    examples: tuple[Example, ...]
    truncated: int
    set_aside: int


def prepare_language(rows: Sequence[Row], tokenizer: Any, max_length: int, columns: ColumnNames) -> Prepared:
    """Tokenise ``rows`` for a causal language model.

    Rows have a prompt and a completion column, a ``messages`` list (the tokenizer's chat template; the loss is on the
    last assistant turn), or a ``text`` column (the loss is on all of it).

    Raises:
        InvalidInput: a column is missing, a value is no text, or the tokenizer has no chat template.
    """
    encode = _language_encoder(rows, tokenizer, columns)
    examples: list[Example] = []
    truncated = dropped = 0
    for number, row in enumerate(rows, start=1):
        prompt, completion = encode(number, row)
        ids = (prompt + completion)[:max_length]
        truncated += len(prompt) + len(completion) > max_length
        # The model shifts labels by one: a completion token at position 0 would have no prediction.
        start = max(len(prompt), 1)
        if len(ids) <= start:
            dropped += 1
            continue
        labels = np.full(len(ids), IGNORED, dtype=np.int64)
        labels[start:] = ids[start:]
        examples.append(Example(input_ids=np.asarray(ids, dtype=np.int64), labels=labels))
    return Prepared(tuple(examples), truncated, dropped)


def prepare_classification(
    rows: Sequence[Row], tokenizer: Any, max_length: int, columns: ColumnNames, classes: Sequence[str]
) -> Prepared:
    """Tokenise ``rows`` for a sequence classifier; ``classes`` are the public names of the classes, in order.

    Two texts (``text_a`` and ``text_b``) are encoded as a pair.

    Raises:
        InvalidInput: a column is missing, or a row's class is none of ``classes``.
    """
    pair = columns.prompt is None and "text_a" in rows[0] and "text_b" in rows[0]
    text = "text_a" if pair else column(rows, columns.prompt, (*TEXT_NAMES, *PROMPT_NAMES), "text", "--prompt-column")
    label = column(rows, columns.label, LABEL_NAMES, "class", "--label-column")
    index = {name: i for i, name in enumerate(classes)}
    examples: list[Example] = []
    truncated = 0
    for number, row in enumerate(rows, start=1):
        if _class(row, label, number) not in index:
            raise InvalidInput(f"row {number}: class {row[label]!r} is none of {', '.join(classes)}")
        first = _text(row, text, number)
        ids = tokenizer(first, _text(row, "text_b", number))["input_ids"] if pair else tokenizer(first)["input_ids"]
        truncated += len(ids) > max_length
        if len(ids) > max_length:  # the last token separates: keep it
            ids = [*ids[: max_length - 1], ids[-1]]
        examples.append(Example(input_ids=np.asarray(ids, dtype=np.int64), labels=index[str(row[label])]))
    return Prepared(tuple(examples), truncated, 0)


def class_names(rows: Sequence[Row], columns: ColumnNames) -> tuple[str, ...]:
    """The classes of ``rows``, sorted: call it on public rows, or on a simulation's, where the names are published."""
    label = column(rows, columns.label, LABEL_NAMES, "class", "--label-column")
    names = {_class(row, label, number) for number, row in enumerate(rows, start=1)}
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    r"""The ids of a prompt as in training: ``<bos> prompt \n``."""
    return [*_one(tokenizer.bos_token_id), *tokenizer(prompt + SEPARATOR, add_special_tokens=False)["input_ids"]]


def _language_encoder(rows: Sequence[Row], tokenizer: Any, columns: ColumnNames) -> Any:
    present = rows[0]
    end = _one(tokenizer.eos_token_id)
    asked = columns.prompt is not None or columns.completion is not None
    if not asked and "messages" in present:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput("the rows hold 'messages', but this model's tokenizer has no chat template")
        return lambda number, row: _chat(tokenizer, row, number)
    if not asked and "text" in present and not any(name in present for name in COMPLETION_NAMES):
        return lambda number, row: (
            _one(tokenizer.bos_token_id),
            [*tokenizer(_text(row, "text", number), add_special_tokens=False)["input_ids"], *end],
        )
    prompt = column(rows, columns.prompt, PROMPT_NAMES, "prompt", "--prompt-column")
    completion = column(rows, columns.completion, COMPLETION_NAMES, "completion", "--completion-column")

    def encode(number: int, row: Row) -> tuple[list[int], list[int]]:
        answer = tokenizer(_text(row, completion, number), add_special_tokens=False)["input_ids"]
        # An empty answer must not teach the model to stop at once: it counts as a record without completion.
        return encode_prompt(tokenizer, _text(row, prompt, number)), [*answer, *end] if answer else []

    return encode


def _chat(tokenizer: Any, row: Row, number: int) -> tuple[list[int], list[int]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "role" in m and "content" in m for m in messages
    ):
        raise InvalidInput(f"row {number}: 'messages' must be a list of objects with 'role' and 'content'")
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        return [], []
    options = {"tokenize": True, "return_dict": False}
    try:
        before = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(messages[: last + 1], **options)
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # templates raise on turns they do not know
        raise InvalidInput(f"row {number}: the chat template refuses these messages ({error})") from error
    if whole[: len(before)] != before:
        raise InvalidInput(
            f"row {number}: the chat template rewrites earlier turns; the completion cannot be told apart"
        )
    return list(before), list(whole[len(before) :])


def _text(row: Row, name: str, number: int) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidInput(f"row {number}: column {name!r} holds {type(value).__name__}, a text is needed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput(f"row {number}: column {name!r} holds half a surrogate pair: not a text in any encoding")
    return value


def _class(row: Row, label: str, number: int) -> str:
    if row.get(label) is None:
        raise InvalidInput(f"row {number}: no class in column {label!r}")
    return str(row[label])


def _one(token: int | None) -> list[int]:
    return [] if token is None else [token]
