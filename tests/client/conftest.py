"""One organisation with a real engine on a tiny model, and a coordinator that signs requests."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from client.backbone import load_model, load_tokenizer
from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from client.trainer import Trainer
from common.config import RunConfig
from common.messages import Envelope, Plan, Reservation, SignedReservation, TrainRequest, adapter_hash
from common.privacy import SampledGaussian
from common.recipe import recipe_hash
from common.signing import SigningKey
from deploy.workshop import Workshop, open_workshop


@pytest.fixture(scope="module")
def workshop(tiny_llama) -> Workshop:
    config = RunConfig.from_mapping(
        {"model": str(tiny_llama), "target-modules": "q_proj,v_proj", "rank": 4, "max-length": 32, "device": "cpu"}
    )
    return open_workshop(config, ())


@pytest.fixture
def fresh_llama(tiny_llama):
    return load_model(tiny_llama, task="causal-lm")


@pytest.fixture
def fresh_bert(tiny_bert):
    return load_model(tiny_bert, task="classification", classes=("bad", "good", "so-so"))


@pytest.fixture(scope="session")
def bert_tokenizer(tiny_bert):
    return load_tokenizer(tiny_bert)


class Organisation:
    """A trainer on its own ledger; ``restart`` is what happens after its process ended."""

    def __init__(self, folder: Path, workshop: Workshop, declared: int = 1000) -> None:
        self.folder, self.workshop, self.declared = folder, workshop, declared
        self.key, self.coordinator, self.accountant = (SigningKey.generate() for _ in range(3))
        self.guard: Guard | None = None
        self.count = 0

    def open(self, examples: Sequence[object], *, seed: int | None = None, listener=None) -> Trainer:
        if self.guard is not None:
            self.guard.close()
        policy = Policy(
            organisation="clinic",
            datasets={
                "notes": DatasetPolicy(
                    declared_records=self.declared, target_epsilon=1e6, without_privacy=True, run_delta=1e-7,
                    target_delta=min(1e-5, 0.1 / self.declared),
                )
            },
            min_noise_multiplier=1e-6,
            max_sample_rate=1.0,
            max_steps_per_round=1000,
            backbones=(self.workshop.workbench.backbone_hash,),
            coordinator_keys=(self.coordinator.public_key,),
            accountant_keys=(self.accountant.public_key,),
        )  # fmt: skip
        self.guard = Guard(policy, self.folder / "own.sqlite", key=self.key)
        return Trainer(
            name="clinic", dataset="notes", examples=examples, declared_records=self.declared,
            workbench=self.workshop.workbench, guard=self.guard, public_key=self.key.public_key, test_seed=seed,
            listener=listener,
        )  # fmt: skip

    def request(
        self, *, noise=1.0, rate=0.1, steps=1, batch=100.0, clip=1.0, adapter=None, run="run", private=True, **changes
    ) -> TrainRequest:
        self.count += 1
        adapter = adapter or self.workshop.workbench.initial
        event = SampledGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps) if private else None
        values = {
            "run_id": f"{run}-{self.count}", "server_round": 1, "client": "clinic", "dataset": "notes", "attempt": 1,
            "participation": 0, "event": event, "local_steps": steps, "clipping_norm": clip if private else 0.0,
            "expected_batch_size": batch, "declared_records": self.declared, "optimizer": "sgd", "learning_rate": 1.0,
            "aggregation": "ffa", "backbone_hash": self.workshop.workbench.backbone_hash,
            "adapter_hash": adapter_hash(adapter), "envelope": Envelope((event,) if event else ()),
            "recipe_hash": recipe_hash(self.workshop.workbench.recipe),
        }  # fmt: skip
        plan = Plan(**(values | changes))
        reservation = Reservation(f"{self.count:032x}", plan.run_id, 1, "clinic", plan.dataset, 1, event)
        head = "a" * 64
        signed = SignedReservation(
            reservation, self.accountant.sign("reservation", reservation.to_json()), head,
            self.accountant.sign("head", {"head": head}),
        )  # fmt: skip
        return TrainRequest(plan, self.coordinator.sign("plan", plan.to_json()), signed, adapter)


@pytest.fixture
def organisation(tmp_path, workshop):
    """organisation(declared=1000) -> Organisation on this test's ledger."""
    made = []

    def make(declared: int = 1000) -> Organisation:
        made.append(Organisation(tmp_path, workshop, declared))
        return made[-1]

    yield make
    for one in made:
        if one.guard is not None:
            one.guard.close()


@pytest.fixture
def quietly():
    """A context in which third-party deprecations of saving and loading do not matter."""

    class Quiet(warnings.catch_warnings):
        def __enter__(self):
            found = super().__enter__()
            warnings.simplefilter("ignore")
            return found

    return Quiet
