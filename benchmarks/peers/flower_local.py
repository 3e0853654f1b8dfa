"""Flower's local-DP wrapper: stock FedAvg, stock ``LocalDpMod`` around an ordinary LoRA client, its ε as users read it.

``LocalDpMod`` clips the update of a whole round to C and adds N(0, (C·√(2 ln(1.25/δ))/ε)²): the ε that it is given is
that of one round, by a formula that is proven for ε < 1 only. The true ε is that of all rounds: two updates of norm ≤ C
differ by up to 2C when one record changes, so each round is a Gaussian of multiplier √(2 ln(1.25/δ))/(2ε), without
sampling, and the rounds are composed by PLD.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg
from peers.setting import Setting, prepare

from client.adapter import set_arrays, trained_arrays
from client.engine import FrozenStates
from common.config import RunConfig
from common.privacy import PLDAccountant, SampledGaussian
from deploy.simulation.inprocess_grid import InProcessGrid

DELTA = 1e-5
ROUNDS, LOCAL_STEPS, RATE = 10, 6, 2e-3
"""As many local steps in all as our run has rounds, few releases: each costs the full ε."""
CLIP = 0.5
"""About the length of six Adam steps: a larger one only adds noise."""


def train_with_local_dp(config: RunConfig, states: FrozenStates) -> dict[str, Any]:
    """One run; the result as fields of a line."""
    setting = prepare(config, states)
    before = setting.scores()
    mod = LocalDpMod(clipping_norm=CLIP, sensitivity=CLIP, epsilon=config.target_epsilon, delta=DELTA)
    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, _trained(setting, message, str(context.node_config["client"]), config))

    logging.getLogger("flwr").setLevel(logging.ERROR)
    arrays = FedAvg(fraction_evaluate=0.0).start(
        InProcessGrid(app, list(setting.silos)),
        ArrayRecord({name: torch.from_numpy(value) for name, value in trained_arrays(setting.workshop.model).items()}),
        num_rounds=ROUNDS,
    )
    set_arrays(setting.workshop.model, _numpy(arrays.arrays))
    score, loss = setting.scores()
    sigma = float(np.sqrt(2 * np.log(1.25 / DELTA)) / config.target_epsilon) / 2
    return {
        "untrained_score": before[0],
        "score": score,
        "untrained_loss": before[1],
        "loss": loss,
        "rounds": ROUNDS,
        "spent": PLDAccountant().compose(SampledGaussian(sigma, 1.0, ROUNDS)).epsilon(DELTA),
        "delta": DELTA,
        "noise_multiplier": {"each": round(sigma, 5)},
        "unit": "record",
        "relation": "add_remove",
        "sampler": "none",
        "accountant": "PLD over the wrapper's rounds",
    }


def _trained(setting: Setting, message: Message, client: str, config: RunConfig) -> dict[str, np.ndarray]:
    """Local Adam from the adapter that arrived, without privacy of its own."""
    model, examples = setting.workshop.model, setting.silos[client]
    set_arrays(model, _numpy(next(iter(message.content.array_records.values()))))
    optimizer, generator = torch.optim.Adam(setting.parameters, lr=RATE), np.random.default_rng()
    for _ in range(LOCAL_STEPS):
        drawn = [examples[i] for i in generator.permutation(len(examples))[: round(config.expected_batch_size or 64)]]
        optimizer.zero_grad()
        for batch in setting.batches(drawn):
            loss = F.cross_entropy(setting.logits(model, batch), batch.labels, reduction="sum") / len(drawn)
            loss.backward()
        optimizer.step()
    return trained_arrays(model)


def _reply(message: Message, arrays: dict[str, np.ndarray]) -> Message:
    record = ArrayRecord({name: torch.from_numpy(value) for name, value in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


def _numpy(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in record.to_torch_state_dict().items()}
