"""A finished, stopped or broken run, read back from its folder: what the ledger, the certificate and the metrics say.

    a simulation's folder       ledger.sqlite, certificate.json, metrics.jsonl, state/run.json
    a coordinator's RUN folder  certificate.json, metrics.jsonl, state.json; the ledger is that of all its runs

Nothing is believed that does not verify, and nothing that is missing is made up: ``missing`` and ``broken`` say what a
reader has to do without. Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.accounts import Registration
from common.certificate import Attested, Certificate, Estimate, Verdict, estimate_of, verify_certificate
from common.charge import charge
from common.errors import CloisterError, InvalidInput, LedgerCorrupt
from common.ledger import GENESIS, Ledger
from common.messages import Reservation
from common.privacy import SampledGaussian

FREE = frozenset({"given back", "never sent"})
"""What became of a reservation that costs nothing; everything else is charged."""


@dataclass
class Asked:
    """One client in one round: what it was asked, and what became of it.

    ``outcome`` is a word of ``common.accounts.Outcome``, ``open`` before there is one, or one of ``FREE``.
    """

    client: str
    server_round: int
    event: SampledGaussian | None
    outcome: str = "open"
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is charged."""
        return self.outcome not in FREE


@dataclass(frozen=True)
class Account:
    """One client of the run: what its ε means, its budget, and the charge of its envelope as it was registered."""

    name: str
    dataset: str
    relation: str
    delta: float | None
    target_epsilon: float | None
    envelope: tuple[SampledGaussian, ...]


@dataclass(frozen=True)
class Point:
    """One client after one round; upper bounds by PLD and RDP, and the Edgeworth estimate beside them."""

    server_round: int
    epsilon: float
    epsilon_rdp: float
    estimate: Estimate | None


@dataclass(frozen=True)
class RunRecord:
    """Everything there is about one run.

    Attributes:
        run_id: its name; empty when nothing in the folder says it.
        verdict: of the certificate; None when there is none or it does not verify.
        metrics: the finished rounds, from round 0.
        accounts, asked: from the ledger, or from the certificate where there is no ledger.
        missing: what is not there, in words; broken: what does not verify.
        has_ledger: whether ``asked`` knows what became of every reservation.
        head: of the ledger, where it was read.
    """

    folder: Path
    run_id: str
    verdict: Verdict | None
    metrics: tuple[Mapping[str, Any], ...]
    accounts: tuple[Account, ...]
    asked: tuple[Asked, ...]
    missing: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    has_ledger: bool = False
    head: str = ""
    state: str = ""

    @property
    def certificate(self) -> Certificate | None:
        """The certificate, if it verifies."""
        return None if self.verdict is None else self.verdict.certificate

    @cached_property
    def by_client(self) -> Mapping[str, tuple[Asked, ...]]:
        """What each client was asked, in the order of rounds."""
        found: dict[str, list[Asked]] = {account.name: [] for account in self.accounts}
        for one in sorted(self.asked, key=lambda item: item.server_round):
            found.setdefault(one.client, []).append(one)
        return {name: tuple(items) for name, items in found.items()}

    @property
    def last_round(self) -> int:
        """The last round that anything is known of."""
        rounds = [int(line["round"]) for line in self.metrics] + [one.server_round for one in self.asked]
        return max(rounds, default=0)

    def spent(self, account: Account, server_round: int) -> Point | None:
        """What is charged to a client after a round; None where there is no bound (a run without privacy)."""
        counted = [one.event for one in self.by_client[account.name] if one.counts and one.server_round <= server_round]
        events = [event for event in counted if event is not None]
        if account.delta is None or len(events) < len(counted):
            return None
        cost = charge(events, relation=account.relation, delta=account.delta)
        estimate = estimate_of(events, relation=account.relation, delta=account.delta)
        return Point(server_round, cost.epsilon, cost.epsilon_rdp, estimate)

    def curve(self, account: Account, rounds: Iterable[int]) -> tuple[Point, ...]:
        """``spent`` after each of ``rounds``."""
        points = (self.spent(account, number) for number in rounds)
        return tuple(point for point in points if point is not None)


@dataclass
class _Notes:
    """What a reader has to do without."""

    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        InvalidInput: there is no such folder, or nothing in it is of a run.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder; give the folder of a run (runs/001, …/runs/RUN)")
    notes = _Notes()
    verdict = _verdict(folder, notes)
    run_id = _run_id(folder) or (verdict.certificate.run_id if verdict else "")
    metrics = _metrics(folder, notes)
    if not run_id and not metrics and verdict is None and not (folder / "ledger.sqlite").exists():
        raise InvalidInput(f"{folder}: holds no run: neither certificate.json, metrics.jsonl, ledger.sqlite nor state")
    if verdict is not None and verdict.certificate.run_id != run_id:
        notes.broken.append(f"certificate.json speaks of run {verdict.certificate.run_id}, this folder is of {run_id}")
        verdict = None
    run_id, accounts, asked, head = _from_ledger(
        folder, run_id, None if verdict is None else verdict.certificate.accountant_head, notes
    )
    has_ledger = head is not None
    if not has_ledger and verdict is not None:
        accounts, asked = _from_certificate(verdict.certificate)
    return RunRecord(
        folder, run_id, verdict, metrics, accounts, asked, tuple(notes.missing), tuple(notes.broken), has_ledger,
        head or "", _state(folder),
    )  # fmt: skip


def _verdict(folder: Path, notes: _Notes) -> Verdict | None:
    file = folder / "certificate.json"
    if not file.exists():
        notes.missing.append(
            "certificate.json: the run has none (yet), so nobody has signed these figures; it goes on with 'cloister "
            "simulate --resume' or 'cloister coordinator runs resume'"
        )
        return None
    try:
        return verify_certificate(file)
    except CloisterError as error:
        notes.broken.append(f"certificate.json does not verify: {error}")
        return None


def _run_id(folder: Path) -> str:
    """The run's name, from a simulation's settings or from where a coordinator keeps its runs."""
    try:
        return str(json.loads((folder / "state" / "run.json").read_text("utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.resolve().name if (folder / "run.toml").exists() else ""


def _metrics(folder: Path, notes: _Notes) -> tuple[Mapping[str, Any], ...]:
    file = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        wanted = {"round", "score", "loss", "epsilon", "seconds"}
        if not all(isinstance(line, dict) and wanted <= set(line) for line in lines):
            raise ValueError("a line lacks a field")
        return tuple(lines)
    except FileNotFoundError:
        notes.missing.append("metrics.jsonl: no round is finished, so there is neither score nor time")
    except (OSError, ValueError) as error:
        notes.broken.append(f"metrics.jsonl cannot be read: {error}")
    return ()


def _from_ledger(
    folder: Path, run_id: str, anchor: str | None, notes: _Notes
) -> tuple[str, tuple[Account, ...], tuple[Asked, ...], str | None]:
    """Run, clients and requests from the verified ledger, and its head; None instead of a head where there is none."""
    file = next(
        (one for one in (folder / "ledger.sqlite", folder.parent.parent / "ledger.sqlite") if one.exists()), None
    )
    if file is None:
        notes.missing.append(
            "ledger.sqlite: what became of each request is not known here (an accountant of its own keeps it)"
        )
        return run_id, (), (), None
    accounts: dict[str, Account] = {}
    asked: dict[str, Asked] = {}
    head = GENESIS
    is_anchored = anchor in (None, GENESIS)
    try:
        with Ledger(file, read_only=True) as ledger:
            for entry in ledger.follow():
                head, is_anchored = entry.hash, is_anchored or entry.hash == anchor
                if entry.kind == "register" and not run_id:
                    run_id = entry.scope
                if entry.scope == run_id:
                    _apply(entry.kind, entry.body, accounts, asked)
    except (KeyError, TypeError, ValueError) as error:
        notes.broken.append(f"{file.name}: a line makes no sense here ({error!r})")
        return run_id, (), (), None
    except CloisterError as error:
        word = "does not verify" if isinstance(error, LedgerCorrupt) else "cannot be read"
        notes.broken.append(f"{file.name} {word}: {error}")
        return run_id, (), (), None
    if not is_anchored:
        notes.broken.append(
            f"{file.name} does not hold the head that the certificate names: lines were cut off, or it was set back"
        )
    if not accounts:
        notes.missing.append(f"{file.name} knows nothing of run {run_id}")
        return run_id, (), (), None
    return run_id, tuple(accounts[name] for name in sorted(accounts)), tuple(asked.values()), head


def _apply(kind: str, body: Mapping[str, Any], accounts: dict[str, Account], asked: dict[str, Asked]) -> None:
    """One line of the run's part of the ledger (``server/accountant.py`` writes them)."""
    if kind == "register":
        accounts[body["client"]] = _account(body["client"], Registration.from_json(body["registration"]))
    elif kind in ("reserve", "import"):
        found = Reservation.from_json(body["reservation"])
        outcome = "open" if kind == "reserve" else "unknown"
        asked[found.reservation_id] = Asked(found.client, found.server_round, found.event, outcome)
    elif kind == "commit":
        for reservation_id, outcome in body["outcomes"].items():
            asked[reservation_id].outcome = str(outcome)
    elif kind == "void":
        refusal = body["refusal"]
        one = asked[body["reservation_id"]]
        one.outcome = "never sent" if refusal is None else "given back"
        one.reason = "" if refusal is None else str(refusal["reason"])


def _account(name: str, registration: Registration) -> Account:
    budget, events = registration.budget, registration.envelope.events
    if budget is None:
        return Account(name, registration.dataset, "", None, None, events)
    return Account(name, registration.dataset, budget.relation, budget.target_delta, budget.target_epsilon, events)


def _from_certificate(certificate: Certificate) -> tuple[tuple[Account, ...], tuple[Asked, ...]]:
    """What the certificate lists: every reservation that counts, without what became of it."""
    accounts = []
    for part in (item.part for item in (*certificate.parts, *certificate.absent)):
        delta = part.delta if part.private else None
        accounts.append(
            Account(part.client, part.dataset, part.relation, delta, part.target_epsilon, part.envelope.events)
        )
    asked = [_as_asked(name, item) for name in sorted(certificate.accounted) for item in certificate.accounted[name]]
    return tuple(sorted(accounts, key=lambda account: account.name)), tuple(asked)


def _as_asked(client: str, item: Attested) -> Asked:
    return Asked(client, item.server_round, item.event, "charged")


def _state(folder: Path) -> str:
    """Where a coordinator says the run stands; empty for a simulation."""
    try:
        return str(json.loads((folder / "state.json").read_text("utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
