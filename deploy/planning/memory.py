"""How much memory the gradient rows of a planned run take: from the backbone's configuration, without its weights."""

from __future__ import annotations

from pathlib import Path

from common.config import RunConfig
from common.errors import InvalidInput

CLASSES = ("first", "second")
"""A plan opens no data to count classes: two are assumed. Each further one adds one row to the head."""


def arena_bytes_per_record(config: RunConfig) -> int | None:
    """Bytes of gradient rows for one record in a micro-batch: what private training adds to a step's memory.

    None where it cannot be known here: the client's libraries are not installed, or the backbone's folder is elsewhere.

    Raises:
        InvalidInput: the folder, the task or a target module is not usable.
    """
    if config.model != "demo" and not Path(config.model).is_dir():
        return None
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError:
        return None
    from client.engine.layout import arena_bytes
    from deploy.workshop import adapt, backbone_folder

    folder = backbone_folder(config.model)
    try:
        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{folder}: no readable configuration ({type(error).__name__})") from error
    kind = AutoModelForCausalLM
    if config.task == "classification":
        kind, settings.num_labels = AutoModelForSequenceClassification, len(CLASSES)
    with torch.device("meta"):  # shapes only: nothing is allocated, whatever the backbone's size
        model = kind.from_config(settings, trust_remote_code=False)
        model.requires_grad_(False)
        model = adapt(model, config)
    return arena_bytes(tuple(p.shape) for p in model.parameters() if p.requires_grad)
