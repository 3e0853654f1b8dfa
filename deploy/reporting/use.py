"""A saved adapter put to use: through stock ``transformers`` and ``peft``, as anybody would load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from client import adapter as adapters
from client.backbone import load_model, load_tokenizer
from client.data import ColumnNames, prepare_classification, prepare_language, read_rows
from client.data.tokens import encode_prompt
from client.evaluator import Evaluation, Evaluator
from common.errors import InvalidInput
from deploy.demo.records import demo_evaluation
from deploy.reporting.statements import read_settings
from deploy.workshop import backbone_folder


def load_adapted(adapter: Path, model: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Model with adapter, tokenizer, and the settings it was trained with.

    Raises:
        InvalidInput: the folder is no adapter of a run, or does not fit the backbone.
    """
    settings = read_settings(adapter)
    configuration = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    folder = backbone_folder(model or configuration["base_model_name_or_path"])
    base = load_model(folder, task=settings["task"], classes=settings["classes"], public_seed=settings["public_seed"])
    return adapters.load(base, adapter), load_tokenizer(folder), settings


def evaluate_adapter(adapter: Path, eval_data: str, model: str | None, columns: ColumnNames) -> Evaluation:
    """Score ``adapter`` on a public set."""
    adapted, tokenizer, settings = load_adapted(adapter, model)
    rows = demo_evaluation(0) if eval_data == "demo" else read_rows(eval_data)
    if settings["task"] == "classification":
        prepared = prepare_classification(rows, tokenizer, settings["max_length"], columns, settings["classes"])
    else:
        prepared = prepare_language(rows, tokenizer, settings["max_length"], columns)
    if not prepared.examples:
        raise InvalidInput(f"{eval_data}: no row keeps a completion token within {settings['max_length']} tokens")
    return Evaluator(adapted, prepared.examples, pad_token_id=tokenizer.pad_token_id).current()


@torch.no_grad()
def generate_with_adapter(adapter: Path, prompt: str, model: str | None, max_new_tokens: int) -> str:
    """The greedy answer of ``adapter`` to ``prompt``."""
    adapted, tokenizer, settings = load_adapted(adapter, model)
    if settings["task"] != "causal-lm":
        raise InvalidInput(f"{adapter}: a {settings['task']} adapter does not generate text; use cloister evaluate")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    output = adapted.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
