"""The organisations of a simulation: a trainer each, with its own guard, ledger and key, behind the same relay.

One process runs every party here, so there is no trust boundary between them; the certificate says so. What is
simulated is the place, not the protocol: the same guard checks the same signatures against the same kind of policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context

from client.engine.batches import Example
from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from client.trainer import StepListener, Trainer, Workbench
from common.attestation import PartRequest
from common.certificate import SignedPart
from common.config import RunConfig
from common.history import ListRequest, SignedHistory
from common.messages import Description, Refusal, Reply, Status, TrainRequest, adapter_hash
from common.signing import SigningKey
from deploy.workshop import Workshop, open_workshop, set_threads
from server.terms import ClientTerms, RunTerms

LEAST_NOISE = 1e-6
"""A simulation's policy leaves the noise to the budget: the envelope's ε is what it refuses on."""


@dataclass(frozen=True)
class StateFolder:
    """Where a simulation keeps what it needs to go on: keys, client ledgers, checkpoint, terms.

    Client files are numbered in the order of names, because a silo's name need not be a file's name.
    """

    path: Path

    def key(self, name: str) -> SigningKey:
        """The throw-away key of a party, made on first use."""
        return SigningKey.load_or_create(self.key_file(name))

    def key_file(self, name: str) -> Path:
        """Where that key is."""
        return self.path / "keys" / f"{name}.key"

    @property
    def accountant_file(self) -> Path:
        """Holds the public key of the run's accountant, embedded or not, from its first sight."""
        return self.path / "accountant.pub"

    def client_ledger(self, index: int) -> Path:
        """The ledger file of the client at ``index`` in the order of names."""
        folder = self.path / "clients" / f"{index + 1:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "ledger.sqlite"

    def client_key(self, index: int) -> SigningKey:
        """The key of that client."""
        return self.key(f"client-{index + 1:04d}")


def describe(name: str, index: int, declared: int, state: StateFolder, workbench: Workbench) -> Description:
    """The public facts of one simulated client, as its trainer will give them."""
    return Description(
        client=name,
        dataset=name,
        public_key=state.client_key(index).public_key,
        declared_records=declared,
        backbone_hash=workbench.backbone_hash,
        shapes={tensor: tuple(array.shape) for tensor, array in workbench.initial.items()},
        trained=tuple(workbench.initial),
        initial_hash=adapter_hash(workbench.initial),
        recipe=dict(workbench.recipe),
    )


def policy_for(client: ClientTerms, terms: RunTerms, coordinator: str, accountant: str) -> Policy:
    """The policy of one simulated organisation: exactly this run's budget, and this run's keys."""
    dataset = DatasetPolicy(
        declared_records=client.declared_records,
        target_epsilon=client.target_epsilon or 1.0,
        target_delta=client.target_delta or min(1e-5, 0.1 / client.declared_records),
        relation=terms.relation,
        accept_large_delta=True,
        without_privacy=client.envelope is None,
    )
    return Policy(
        organisation=client.name,
        datasets={client.dataset: dataset},
        min_noise_multiplier=LEAST_NOISE,
        max_sample_rate=1.0,
        max_steps_per_round=client.local_steps,
        backbones=(terms.backbone_hash,),
        coordinator_keys=(coordinator,),
        accountant_keys=(accountant,),
    )


def open_guard(client: ClientTerms, index: int, terms: RunTerms, state: StateFolder) -> Guard:
    """The guard of one simulated client on its own ledger file."""
    accountant = state.accountant_file.read_text("ascii").strip()
    policy = policy_for(client, terms, state.key("coordinator").public_key, accountant)
    return Guard(policy, state.client_ledger(index), key=state.client_key(index))


def build_trainer(
    client: ClientTerms,
    examples: Sequence[Example],
    guard: Guard,
    workbench: Workbench,
    seed: int | None,
    listener: StepListener | None = None,
) -> Trainer:
    """One simulated organisation's trainer."""
    workbench.open_for(examples)
    return Trainer(
        name=client.name,
        dataset=client.dataset,
        examples=examples,
        declared_records=client.declared_records,
        workbench=workbench,
        guard=guard,
        public_key=guard.public_key,
        test_seed=seed,
        listener=listener,
    )


@dataclass(frozen=True)
class InProcessClients:
    """Connects a node to its trainer in this process, by the name in the node's configuration."""

    trainers: Mapping[str, Trainer] = field(repr=False)

    def __call__(self, context: Context) -> Trainer:
        """The trainer of that node."""
        return self.trainers[str(context.node_config["client"])]


@dataclass(frozen=True)
class FolderClients:
    """Connects a node of Flower's simulation engine: each actor loads the model once, each message one client's data.

    ``folder`` holds what ``write_for_actors`` wrote; it is deleted when the run ends.
    """

    folder: Path

    def __call__(self, context: Context) -> _OneCall:
        """A connection to the client with the node's partition id."""
        return _OneCall(self.folder, int(context.node_config["partition-id"]))


@dataclass(frozen=True)
class _OneCall:
    """A trainer for one message: it opens the client's ledger and gives it free again, for the next actor."""

    folder: Path
    index: int

    def describe(self) -> Description:
        return self._with_trainer(lambda trainer: trainer.describe())

    def train(self, request: TrainRequest) -> Reply | Refusal | Status:
        return self._with_trainer(lambda trainer: trainer.train(request))

    def signed_list(self, request: ListRequest) -> SignedHistory | Status:
        return self._with_trainer(lambda trainer: trainer.signed_list(request))

    def signed_part(self, request: PartRequest) -> SignedPart | Status:
        return self._with_trainer(lambda trainer: trainer.signed_part(request))

    def _with_trainer(self, call):  # type: ignore[no-untyped-def]
        config, terms, state, workshop = _actor(self.folder)
        client = terms.clients[self.index]
        guard = open_guard(client, self.index, terms, state)
        try:
            examples = _read_examples(self.folder, self.index)
            return call(build_trainer(client, examples, guard, workshop.workbench, config.seed))
        finally:
            guard.close()


def write_for_actors(
    folder: Path, config: RunConfig, classes: Sequence[str], terms: RunTerms, state: StateFolder,
    examples: Mapping[str, Sequence[Example]],
) -> None:  # fmt: skip
    """Put what the actors need into ``folder``: settings, terms, and each client's examples (private: mode 0700)."""
    folder.chmod(0o700)
    body = {
        "config": config.model_dump(mode="json", by_alias=True),
        "classes": list(classes),
        "terms": terms.to_json(),
        "state": str(state.path.resolve()),
    }
    (folder / "run.json").write_text(json.dumps(body), "utf-8")
    for index, client in enumerate(terms.clients):
        own = examples[client.name]
        lengths = np.array([len(example.input_ids) for example in own], dtype=np.int64)
        flat = np.concatenate([example.input_ids for example in own])
        labels = np.concatenate([np.atleast_1d(example.labels) for example in own])
        whole = np.asarray(config.task == "classification")
        np.savez(folder / f"{index}.npz", allow_pickle=False, lengths=lengths, ids=flat, labels=labels, whole=whole)


@lru_cache(maxsize=1)
def _actor(folder: Path) -> tuple[RunConfig, RunTerms, StateFolder, Workshop]:
    """Loaded once per actor process."""
    body = json.loads((folder / "run.json").read_text("utf-8"))
    config = RunConfig.from_mapping(body["config"])
    set_threads(config.threads or 1)
    workshop = open_workshop(config, body["classes"], test=False)
    return config, RunTerms.from_json(body["terms"]), StateFolder(Path(body["state"])), workshop


@lru_cache(maxsize=64)
def _read_examples(folder: Path, index: int) -> tuple[Example, ...]:
    with np.load(folder / f"{index}.npz", allow_pickle=False) as file:
        lengths, ids, labels, whole = file["lengths"], file["ids"], file["labels"], bool(file["whole"])
    ends = np.cumsum(lengths)
    pieces = np.split(ids, ends[:-1])
    if whole:
        return tuple(Example(piece, int(label)) for piece, label in zip(pieces, labels, strict=True))
    return tuple(Example(piece, own) for piece, own in zip(pieces, np.split(labels, ends[:-1]), strict=True))
