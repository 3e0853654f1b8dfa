"""``report.html`` and ``cloister report DIR``: a run on one page, for the people who decide about privacy.

One file that needs no script and asks nobody for anything; it prints, and can be read in light and dark. Everything on
it is read back from the run's folder and checked first (``run_record.py`` beside this file), so the page that a run
leaves and the page that is written again years later are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from common import statement
from common.certificate import Certificate, Estimate
from common.charge import charge
from common.contradiction import sentence
from common.pages import Series, column_chart, environment, line_chart
from common.parts import ABSENT
from common.signing import fingerprint
from deploy.reporting.run_record import FREE, Account, Point, RunRecord
from server.checkpoint import write_atomically

MOST_CHARTS, MOST_ROWS, MOST_ROUNDS, MOST_POINTS = 6, 100, 150, 240
"""Organisations drawn and listed, rounds listed, and points of a curve that are computed; the rest is counted."""


@dataclass(frozen=True)
class Spending:
    """One organisation's line of the report; None where there is no bound.

    Attributes:
        guarantee: certified ε of the whole envelope; spent: of what is charged by now, with its companions.
        asked, charged: rounds in which it was asked, and those that cost.
        is_attested: whether the organisation itself signed what began there.
    """

    account: Account
    guarantee: float | None
    spent: Point | None
    asked: int
    charged: int
    declared_records: int | None
    noise: str
    is_attested: bool

    @property
    def share(self) -> float:
        """Of the budget, for a bar; 0 without one."""
        if self.guarantee is None or not self.account.target_epsilon:
            return 0.0
        return min(1.0, self.guarantee / self.account.target_epsilon)


def write_report(record: RunRecord, path: Path) -> None:
    """Write the page, by rename.

    Raises:
        Unavailable: it cannot be written.
    """
    write_atomically(path, page(record).encode())


def page(record: RunRecord) -> str:
    """The page as HTML."""
    certificate = record.certificate
    rows = [_spending(record, account) for account in record.accounts]
    rows.sort(key=lambda row: -(math.inf if row.guarantee is None else row.guarantee))
    drawn = rows[:MOST_CHARTS]
    curves = {row.account.name: record.curve(row.account, _shown_rounds(record, len(drawn))) for row in drawn}
    is_private = certificate is not None and certificate.private
    absent = () if certificate is None else certificate.absent
    return environment("deploy.reporting").get_template("report.html").render(
        assets=None,
        record=record,
        certificate=certificate,
        rows=rows[:MOST_ROWS],
        more_rows=max(0, len(rows) - MOST_ROWS),
        largest=max((row.guarantee for row in rows if row.guarantee is not None and row.is_attested), default=None),
        is_private=is_private,
        headline="" if certificate is None else statement.headline(certificate),
        paragraphs=_paragraphs(record) if is_private else (),
        absent=[(one.part.client, ABSENT[one.reason]) for one in absent if one.signed is None],
        contradicting=[
            (one.part.client, sentence(certificate.contradictions(one)))
            for one in absent
            if certificate is not None and one.signed is not None
        ],
        verified=statement.VERIFIED,
        scores=_scores(record),
        charts=[_chart(row, index, curves[row.account.name]) for index, row in enumerate(drawn)],
        undrawn=max(0, len(rows) - MOST_CHARTS),
        lines=_lines(record, [row.account.name for row in drawn]),
        names=[row.account.name for row in drawn],
        troubles=_troubles(record),
        facts={} if certificate is None else _facts(certificate),
        hashes={} if certificate is None else _hashes(record, certificate),
    )  # fmt: skip


def _paragraphs(record: RunRecord) -> tuple[str, ...]:
    """Who is protected, and what the numbers mean: the very sentences of the certificate and the model card."""
    if record.verdict is None:
        return ()
    certificate, epsilons = record.verdict.certificate, record.verdict.epsilons
    found = (statement.who_is_protected(certificate), statement.what_epsilon_means(certificate, epsilons))
    return tuple(text for text in found if text)


def _spending(record: RunRecord, account: Account) -> Spending:
    asked = record.by_client[account.name]
    guarantee = None
    if account.delta is not None and account.envelope:
        guarantee = charge(account.envelope, relation=account.relation, delta=account.delta).epsilon
    certificate = record.certificate
    every = () if certificate is None else (*certificate.parts, *certificate.absent)
    part = next((item.part for item in every if item.part.client == account.name), None)
    return Spending(
        account,
        guarantee if guarantee is None or math.isfinite(guarantee) else None,
        record.spent(account, record.last_round),
        len({one.server_round for one in asked}),
        sum(one.counts for one in asked),
        None if part is None else part.declared_records,
        _noise(account),
        certificate is None or account.name in {item.part.client for item in certificate.parts},
    )


def _noise(account: Account) -> str:
    """σ of the rounds, or its range."""
    levels = sorted({event.noise_multiplier for event in account.envelope})
    if not levels:
        return "–"
    return f"{levels[0]:.4f}" if len(levels) == 1 else f"{levels[0]:.4f} to {levels[-1]:.4f}"


def _shown_rounds(record: RunRecord, clients: int) -> list[int]:
    """The rounds at which a curve is computed: all, or so many that the page is ready in seconds."""
    last = record.last_round
    step = max(1, -(-(last + 1) * max(1, clients) // MOST_POINTS))
    return sorted({*range(0, last + 1, step), last})


def _chart(row: Spending, index: int, points: Sequence[Point]) -> Markup:
    account = row.account
    estimates = [(point.server_round, _value(point.estimate)) for point in points]
    series = [
        Series("certified (PLD)", [(point.server_round, point.epsilon) for point in points], 0),
        Series("by RDP, an upper bound too", [(point.server_round, point.epsilon_rdp) for point in points], 1),
        Series("Edgeworth estimate, no guarantee", estimates, 2),
    ]
    target = account.target_epsilon
    outside = any(point.estimate is not None and not point.estimate.in_regime for point in points)
    note = "The estimate is outside its regime in some of these rounds." if outside else ""
    return line_chart(
        series, name=f"epsilon-{index}", title=f"{account.name}: ε after each round", y_label="ε", zero=True,
        limit=None if target is None else ("target ε", target), note=note,
    )  # fmt: skip


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.epsilon


def _scores(record: RunRecord) -> list[Markup]:
    """Score, loss and time per round."""
    if not record.metrics:
        return []

    def points(name: str) -> list[tuple[int, float | None]]:
        return [(int(line["round"]), line[name]) for line in record.metrics]

    charts = []
    if any(line["score"] is not None for line in record.metrics):
        charts.append(line_chart([Series("score", points("score"))], name="score", title="Score on the public set",
                                 y_label="score"))  # fmt: skip
    if any(line["loss"] is not None for line in record.metrics):
        charts.append(line_chart([Series("loss", points("loss"))], name="loss", title="Loss on the public set",
                                 y_label="nats"))  # fmt: skip
    if len(record.metrics) > 1:
        seconds = [item for item in points("seconds") if item[0] > 0]
        charts.append(
            column_chart([Series("seconds", seconds)], name="seconds", title="Seconds per round", y_label="seconds")
        )
    return charts


def _lines(record: RunRecord, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per round; of very many rounds every n-th, the last, and all in which something went wrong."""
    metrics = {int(line["round"]): line for line in record.metrics}
    by_round: dict[int, list[Any]] = {}
    for one in record.asked:
        by_round.setdefault(one.server_round, []).append(one)
    every = sorted({*metrics, *by_round})
    step = -(-len(every) // MOST_ROUNDS) if every else 1
    troubled = {number for number, asked in by_round.items() if any(_is_trouble(one.outcome) for one in asked)}
    shown = [n for i, n in enumerate(every) if i % step == 0 or n == every[-1] or n in troubled]
    return [_line(record, number, metrics.get(number), by_round.get(number, ()), names) for number in shown]


def _line(
    record: RunRecord, number: int, line: Mapping[str, Any] | None, asked: Sequence[Any], names: Sequence[str]
) -> dict[str, Any]:
    outcomes = Counter(one.outcome for one in asked)
    epsilon = (line or {}).get("epsilon") or {}
    return {
        "round": number,
        "score": None if line is None else line["score"],
        "loss": None if line is None else line["loss"],
        "seconds": None if line is None else line["seconds"],
        "asked": len(asked),
        "replied": outcomes["replied"] + outcomes["charged"],
        "free": sum(outcomes[word] for word in FREE),
        "failed": sum(count for word, count in outcomes.items() if word not in {*FREE, "replied", "charged"}),
        "charged": sum(one.counts for one in asked),
        "epsilon": [epsilon.get(name) for name in names],
    }


def _is_trouble(outcome: str) -> bool:
    return outcome not in ("replied", "charged")


def _troubles(record: RunRecord) -> list[dict[str, Any]]:
    """Every answer that was no update, and whether it was charged."""
    found = sorted((one for one in record.asked if _is_trouble(one.outcome)), key=lambda o: (o.server_round, o.client))
    return [
        {
            "round": one.server_round, "client": one.client, "charged": one.counts,
            "what": f"refused ({one.reason}); it never started" if one.outcome == "given back" else one.outcome,
        }
        for one in found
    ]  # fmt: skip


def _facts(certificate: Certificate) -> dict[str, str]:
    """The methods of the run, from the certificate."""
    units = sorted({item.part.unit for item in certificate.parts})
    relations = sorted({item.part.relation for item in certificate.parts})
    samplers = sorted({item.part.sampler for item in certificate.parts})
    mechanisms = sorted({item.part.mechanism for item in certificate.parts if item.part.mechanism})
    return {
        "unit": ", ".join(units),
        "neighbouring relation": "; ".join(f"{name} ({statement.RELATIONS.get(name, name)})" for name in relations),
        "sampler": ", ".join(samplers),
        "clipping and noise": "; ".join(mechanisms) or "–",
        "noise over the rounds": certificate.noise_schedule,
        "noise over the modules": certificate.noise_allocation,
        "aggregation": certificate.aggregation,
        "server optimizer": certificate.server_optimizer,
        **{name.replace("-", " "): value for name, value in certificate.methods.items()},
        "software": certificate.software or "–",
    }


def _hashes(record: RunRecord, certificate: Certificate) -> dict[str, str]:
    found = {
        "backbone": certificate.backbone_hash,
        "untrained adapter": certificate.initial_adapter_hash,
        "trained adapter": certificate.adapter_hash,
        "ledger's head when the certificate was signed": certificate.accountant_head,
        "coordinator's key": f"{certificate.coordinator_key} (fingerprint {fingerprint(certificate.coordinator_key)})",
        "accountant's key": f"{certificate.accountant_key} (fingerprint {fingerprint(certificate.accountant_key)})",
    }
    programs = sorted({item.part.code_digest for item in certificate.parts})
    found["program that trained"] = ", ".join(programs)
    if record.head and record.head != certificate.accountant_head:
        found["ledger's head now"] = record.head
    return found
