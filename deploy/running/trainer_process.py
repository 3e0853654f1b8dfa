"""The long-lived trainer of an organisation: everything that can be wrong is found before a record is read.

In this order: settings, policy, the backbone's hash, the organisation's own ledger (a second trainer on it is
refused), the model with its self-test on made-up tokens, and only then the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.backbone import backbone_hash
from client.data import read_rows
from client.engine.batches import Example
from client.guard import Guard
from client.policy import Policy
from client.progress import Progress, WatchedTrainer, serve_status, status_of
from client.settings import TrainerSettings
from client.trainer import Trainer
from client.trainer_service import serve
from common.errors import InvalidInput, Refused
from common.signing import SigningKey
from deploy.inputs import tokenise
from deploy.running.ending import Ending
from deploy.workshop import Workshop, backbone_folder, open_workshop, set_threads


@dataclass(frozen=True)
class Ready:
    """A trainer that is about to be served."""

    trainer: Trainer
    guard: Guard
    dataset: str
    settings: TrainerSettings


def check_backbone(settings: TrainerSettings, policy: Policy) -> str:
    """The hash of the backbone on disk, if the policy allows it.

    Raises:
        InvalidInput: there is no such backbone. Refused: the policy names others.
    """
    folder = backbone_folder(settings.run.model)
    found = backbone_hash(folder)
    if found not in policy.backbones:
        named = ", ".join(one[:16] + "…" for one in policy.backbones) or "none"
        raise Refused(
            f"{folder}: its hash is {found}, the policy allows {named}: get the right backbone "
            "('cloister backbone verify' says which it is), or add the hash to backbones if it is trusted"
        )
    return found


def open_trainer(policy_path: Path, settings: TrainerSettings, progress: Progress | None = None) -> Ready:
    """Load everything; the guard holds the ledger from here on and must be closed.

    Raises:
        InvalidInput: a setting, the policy, the backbone or the data is not usable.
        Refused: the policy does not allow the backbone, or another process holds the ledger.
    """
    policy = Policy.load(policy_path)
    dataset = settings.dataset_of(tuple(policy.datasets))
    if settings.run.task == "classification" and len(settings.classes) < 2:
        raise InvalidInput("classification needs the setting classes = [...]: public names, the same at every trainer")
    check_backbone(settings, policy)
    guard = Guard(policy, settings.ledger, key=SigningKey.load_or_create(settings.key))
    try:
        set_threads(settings.run.threads)
        workshop = open_workshop(settings.run, settings.classes)
        examples = read_examples(settings, workshop)
        workshop.workbench.open_for(examples)
        declared = policy.datasets[dataset].declared_records
        trainer = Trainer(
            name=policy.organisation,
            dataset=dataset,
            examples=examples,
            declared_records=declared,
            workbench=workshop.workbench,
            guard=guard,
            public_key=guard.public_key,
            listener=progress,
        )
    except BaseException:
        guard.close()
        raise
    return Ready(trainer, guard, dataset, settings)


def read_examples(settings: TrainerSettings, workshop: Workshop) -> Sequence[Example]:
    """The organisation's records as examples.

    Raises:
        InvalidInput: a file, a column or a row is not usable, or nothing usable is left.
    """
    rows = read_rows(settings.run.data)
    prepared = tokenise(settings.run, rows, workshop.tokenizer, workshop.max_length, settings.classes)
    if not prepared.examples:
        raise InvalidInput(
            f"{settings.run.data}: none of its records keeps a completion token within {workshop.max_length} tokens: "
            "raise max-length, or check prompt-column and completion-column"
        )
    return prepared.examples


def run_trainer(policy_path: Path, settings: TrainerSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. What is being trained may end within ``stop-after-s``; after that it is lost.

    Raises:
        CloisterError: see ``open_trainer``; Unavailable when a socket cannot be made.
    """
    progress = Progress()
    ending = Ending()
    ready = open_trainer(policy_path, settings, progress)
    with ready.guard:
        status = serve_status(Path(settings.status), lambda: status_of(ready.guard, ready.dataset, progress))
        server = serve(WatchedTrainer(ready.trainer, progress), settings.address)
        say(f"trainer of {ready.trainer.name} listens on {settings.address}")
        say(f"public key {ready.guard.public_key}")
        ending.wait()
        _close(server, status, settings)
        is_training = progress.is_training
    if is_training:  # its thread would hold this process; the ledger says started, so the next start says lost
        say("a training was cut off: it is spent, and will be reported as lost")
        os._exit(0)


def _close(server: Any, status: Any, settings: TrainerSettings) -> None:
    server.stop(settings.stop_after_s).wait()
    status.shutdown()
    Path(settings.status).unlink(missing_ok=True)
    if settings.address.startswith("unix:"):
        Path(settings.address.removeprefix("unix:")).unlink(missing_ok=True)
