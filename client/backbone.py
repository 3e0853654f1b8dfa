"""The frozen model under the adapter: a folder of safetensors, checked before it is loaded, named by its hash.

A backbone is code (docs/privacy.md): only safetensors are read, no code of the folder runs, and a configuration that
asks for some (``auto_map``) is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import InvalidInput, Unavailable

HASHED = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of the files that make a backbone what it is: weights, configuration, tokenizer, chat template."""

NOT_HASHED = frozenset({"data_config.json", "modules.json", "sentence_bert_config.json"})


def resolve(model: str) -> Path:
    """The local folder of ``model``: the folder itself, or a hub id's copy on this machine, downloaded if allowed.

    Raises:
        InvalidInput: the folder is missing or holds no safetensors.
        Unavailable: the hub cannot be reached and there is no copy.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise InvalidInput(f"{model}: no such model folder")
        folder = _from_hub(model)
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Refuse a folder that is no plain safetensors model or that brings code.

    Raises:
        InvalidInput: names the file and the reason.
    """
    configuration = folder / "config.json"
    if not configuration.is_file():
        raise InvalidInput(f"{folder}: no config.json: not a model folder")
    values = _json_object(configuration)
    for file in (configuration, folder / "tokenizer_config.json"):
        if file.is_file() and "auto_map" in _json_object(file):
            raise InvalidInput(f"{file}: asks for code of its own (auto_map); a backbone may bring none")
    if not list(folder.glob("*.safetensors")):
        pickles = [file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in folder.glob(suffix)]
        hint = f"; {pickles[0]} is a pickle and is not read: convert it to safetensors" if pickles else ""
        raise InvalidInput(f"{folder}: no *.safetensors file{hint}")
    if "model_type" not in values:
        raise InvalidInput(f"{configuration}: has no model_type")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: not readable JSON ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"{file}: not a JSON object")
    return values


def backbone_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the backbone, in the order of their names."""
    hasher = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.endswith(HASHED) and file.name not in NOT_HASHED:
            hasher.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    hasher.update(block)
    return hasher.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a padding token.

    Raises:
        InvalidInput: the folder has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{folder}: no readable tokenizer ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise InvalidInput(f"{folder}: the tokenizer has neither padding, end nor unknown token")
    tokenizer.model_max_length = 1 << 30  # truncation is ours, and counted
    return tokenizer


def load_model(
    folder: Path, *, task: str, classes: Sequence[str] = (), public_seed: int = 0, precision: str = "float32"
) -> Any:
    """The stock model class of ``folder`` for ``task``, frozen, dropout off.

    A classification head is not in the checkpoint: it is drawn from ``public_seed`` and becomes part of the adapter.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": True,
        "dtype": dtype,
    }
    try:
        with _quiet(), seeded(public_seed):
            if task == "classification":
                names = dict(enumerate(classes))
                model = AutoModelForSequenceClassification.from_pretrained(
                    str(folder),
                    num_labels=len(classes),
                    id2label=names,
                    label2id={name: i for i, name in names.items()},
                    **options,
                )
            else:
                model = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInput(f"{folder}: cannot be loaded for {task} ({_first_line(error)})") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    model.requires_grad_(False)
    return model


def context_length(model: Any) -> int:
    """The longest input the model takes, in tokens."""
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    if positions is None:
        return 1 << 20
    # RoBERTa-like models keep the first positions for padding.
    reserved = (model.config.pad_token_id or 0) + 1 if model.config.model_type in {"roberta", "xlm-roberta"} else 0
    return int(positions) - reserved


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generator at ``seed`` and put it back afterwards: public initialisations only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and its table of missing heads off the terminal."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with _quiet():
            return Path(snapshot_download(model, allow_patterns=[f"*{ending}" for ending in HASHED]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise Unavailable(
            f"{model}: no such folder, and no model hub can be reached for that id ({_first_line(error)}); "
            "give the folder of a downloaded model"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
