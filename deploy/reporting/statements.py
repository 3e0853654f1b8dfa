"""What a run leaves in its folder besides the ledger: adapter, model card, certificate, metrics, report.

Every file is written beside and renamed, every folder too: a killed run leaves no half of anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.guard import Guard
from common.certificate import Certificate, ClientPart, SignedPart, sign_part, statement
from common.code import code_digest
from common.config import RunConfig, default_delta
from common.errors import InvalidInput, Refused
from common.messages import Arrays, Envelope
from common.signing import SigningKey
from deploy.reporting.folders import replace_folder
from deploy.workshop import Workshop
from server.accountant import EmbeddedAccountant
from server.certify import Circumstances, certify, reasons_against
from server.checkpoint import write_atomically
from server.terms import ClientTerms, RunTerms

SETTINGS = "cloister.json"
"""Beside the adapter: what ``cloister evaluate`` and ``cloister generate`` need to use it as it was trained."""

ROOMS = ("client", "common", "server")
"""The packages whose source is named by the certificate's digest."""


def write_metrics(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """All lines at once, by rename."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in metrics)
    write_atomically(path, lines.encode())


@dataclass(frozen=True)
class Run:
    """What the statements about a finished simulation are made from."""

    config: RunConfig
    terms: RunTerms
    classes: tuple[str, ...]
    held_out: int
    max_length: int
    accountant: EmbeddedAccountant
    coordinator: SigningKey
    client_keys: Mapping[str, SigningKey]

    def certificate(self, guards: Mapping[str, Guard], final: Arrays, rounds_run: int) -> bytes:
        """The signed certificate: each client signs its own part, the coordinator the whole."""
        return certify(
            terms=self.terms,
            accountant=self.accountant,
            coordinator=self.coordinator,
            parts=[self._part(client, guards[client.name]) for client in self.terms.clients],
            final=final,
            rounds_run=rounds_run,
            circumstances=Circumstances(simulation=True, reasons=reasons_against(self.config), notes=self._notes()),
        )

    def _part(self, client: ClientTerms, guard: Guard) -> SignedPart:
        """What the organisation attests from its own book; a client that was never asked attests that nothing began."""
        coordinator = self.coordinator.public_key
        program = code_digest(*ROOMS)
        try:
            return guard.part(coordinator, self.terms.run_id, client.dataset, code_digest=program)
        except Refused:  # nothing was ever charged: it was never asked
            pass
        head = guard.head(coordinator)
        part = ClientPart(
            run_id=self.terms.run_id,
            client=client.name,
            dataset=client.dataset,
            public_key=guard.public_key,
            relation=self.terms.relation,
            delta=client.target_delta or default_delta(client.declared_records),
            target_epsilon=client.target_epsilon,
            declared_records=client.declared_records,
            clipping_norm=client.clipping_norm,
            envelope=client.envelope or Envelope(()),
            rounds=(),
            first_head=head,
            last_head=head,
            code_digest=program,
        )
        return sign_part(self.client_keys[client.name], part)

    def _notes(self) -> tuple[str, ...]:
        notes = ["a simulation: every party ran in one process, with keys made for this run"]
        if self.held_out:
            notes.append(
                f"{self.held_out} records were set aside for evaluation before training: they count as public and are "
                "not covered"
            )
        if self.classes:
            notes.append(
                "the names of the classes were read from all records and are published with the adapter: they count as "
                "public and are not covered"
            )
        if self.config.silo_column is not None:
            notes.append(
                f"the silos and their names were read from the column {self.config.silo_column}: they count as public "
                "and are not covered"
            )
        if self.terms.relation == "zero_out":
            notes.append(
                "declared sizes follow from the data (rounded down to two digits), so the relation is zero_out: a "
                "neighbouring data set has a record that contributes nothing instead"
            )
        return tuple(notes)


def write_adapter(
    folder: Path, workshop: Workshop, final: Arrays, run: Run, certificate: Certificate, metrics: Sequence[Any]
) -> None:
    """The adapter with its model card, as ``PeftModel.from_pretrained`` loads it; replaced as a whole."""
    settings = {
        "task": run.config.task,
        "classes": list(run.classes),
        "max_length": run.max_length,
        "backbone_hash": run.terms.backbone_hash,
        "aggregation": run.terms.aggregation,
        "public_seed": run.terms.public_seed,
    }

    def write(beside: Path) -> None:
        workshop.save(final, beside)
        (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (beside / "README.md").write_text(model_card(run, certificate, metrics), "utf-8")

    replace_folder(folder, write)


def model_card(run: Run, certificate: Certificate, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The adapter's README: what it is, how well it does, and the privacy statement."""
    first, last = metrics[0], metrics[-1]
    score = "no public evaluation set was given"
    if last["score"] is not None:
        what = "accuracy" if run.config.task == "classification" else "next-token accuracy on completion tokens"
        score = (
            f"{what} on the public set: {_number(last['score'])} after round {last['round']} "
            f"(untrained: {_number(first['score'])}); loss {_number(last['loss'])} "
            f"(untrained: {_number(first['loss'])})"
        )
    return (
        "---\nlibrary_name: peft\ntags:\n- lora\n- differential-privacy\n- federated-learning\n---\n"
        f"# LoRA adapter of run {run.terms.run_id}\n\n"
        f"Trained by {len(run.terms.clients)} organisations in {last['round']} rounds on the backbone with hash "
        f"`{run.terms.backbone_hash[:16]}…`. {score}.\n\n"
        f"## Privacy\n\n{_inert(statement(certificate))}\n"
    )


def _inert(text: str) -> str:
    """The same words in Markdown: a name that somebody chose opens no tag and makes no link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def read_settings(adapter: Path) -> dict[str, Any]:
    """What ``write_adapter`` noted beside the adapter.

    Raises:
        InvalidInput: the folder is no adapter of ours.
    """
    try:
        return dict(json.loads((adapter / SETTINGS).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{adapter}: no readable {SETTINGS}: give the adapter folder of a run") from error
