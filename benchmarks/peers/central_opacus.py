"""Central DP-LoRA with Opacus: all silos' records in one place, one Adam, Opacus's PrivacyEngine and accountant.

As many steps as our run has rounds, and an expected batch as large as all silos' together. What it shows is the price
of the federation: the same noise on one sum in place of one sum per silo.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from peers.setting import Setting, prepare
from torch.utils.data import DataLoader, TensorDataset

from client.engine import FrozenStates
from common.config import RunConfig

DELTA = 1e-5


def train_centrally(config: RunConfig, states: FrozenStates) -> dict[str, Any]:
    """One run; the result as fields of a line."""
    setting = prepare(config, states)
    pooled = [example for examples in setting.silos.values() for example in examples]
    expected = (config.expected_batch_size or 64.0) * len(setting.silos)
    before = setting.scores()
    sigma = get_noise_multiplier(
        target_epsilon=config.target_epsilon,
        target_delta=DELTA,
        sample_rate=1 / math.ceil(len(pooled) / round(expected)),  # as Opacus takes it from its loader
        steps=config.rounds,
        accountant="prv",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus: secure_mode is off, hooks fire on partly frozen layers
        epsilon = _train(setting, pooled, round(expected), config, sigma)
    score, loss = setting.scores()
    return {
        "untrained_score": before[0],
        "score": score,
        "untrained_loss": before[1],
        "loss": loss,
        "rounds": config.rounds,
        "spent": epsilon,
        "delta": DELTA,
        "noise_multiplier": {"all": round(sigma, 5)},
        "unit": "record",
        "relation": "add_remove",
        "sampler": "poisson",
        "accountant": "PRV (Opacus)",
    }


def _train(setting: Setting, pooled: list[Any], expected: int, config: RunConfig, sigma: float) -> float:
    engine = PrivacyEngine(accountant="prv")
    loader: Any = DataLoader(TensorDataset(torch.arange(len(pooled))), batch_size=expected)
    setting.workshop.model.train()  # Opacus asks for it; every dropout rate is zero
    model, optimizer, loader = engine.make_private(
        module=setting.workshop.model,
        optimizer=torch.optim.Adam(setting.parameters, lr=config.server_learning_rate),
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=config.clipping_norm,
        wrap_model=True,
    )
    steps = 0
    while steps < config.rounds:
        for (drawn,) in loader:
            _step(setting, model, optimizer, [pooled[i] for i in drawn.tolist()])
            steps += 1
            if steps == config.rounds:
                break
    model.remove_hooks()
    return float(engine.get_epsilon(DELTA))


def _step(setting: Setting, model: Any, optimizer: Any, drawn: list[Any]) -> None:
    """One logical step in micro-batches, by Opacus's own way of skipping steps."""
    batches = setting.batches(drawn)
    for place, batch in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(setting.logits(model, batch), batch.labels, reduction="mean").backward()
        optimizer.signal_skip_step(do_skip=place < len(batches) - 1)
        optimizer.step()
    optimizer.zero_grad()
