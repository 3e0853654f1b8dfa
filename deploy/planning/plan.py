"""``cloister plan``: what a run will cost, before any data is touched (``calibration.py`` has ``cloister calibrate``).

Everything is computed from public numbers. The certified ε is the PLD's; RDP stands beside it as a second upper bound,
the Edgeworth estimate (EW-Tune's accountant) as an estimate, marked as such.

>>> rounds = RoundPlan(noise_multiplier=1.0, sample_rate=0.01, local_steps=10, rounds=100)
>>> report = plan_report(rounds, target_delta=1e-5)
>>> round(report.epsilon, 2)
1.83
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.privacy import EdgeworthAccountant, PLDAccountant, RDPAccountant, SampledGaussian, TooLarge
from common.privacy.calibrate import (
    calibrate_noise_multiplier,
    largest_count_meeting,
)
from common.privacy.checks import Relation, count, known_relation, positive
from common.privacy.events import checked
from common.privacy.gdp import composed_mu, gdp_epsilon
from common.privacy.schedules import calibrate_factor
from server.schedules import shape_of

SAMPLER = "poisson"
MOST_POINTS = 200
"""A curve over the rounds has at most so many points; up to so many rounds it has one for each."""


@dataclass(frozen=True)
class NoiseShape:
    """How the noise moves over the rounds: the settings ``noise-schedule``, ``noise-final``, … of a run."""

    schedule: str = "constant"
    final: float = 0.5
    drop: float = 0.5
    every: int | None = None
    server_schedule: str = "constant"

    def relative(self, rounds: int) -> list[float]:
        """Relative noise of each round, 1 at the first."""
        found = shape_of(
            self.schedule,
            rounds,
            final=self.final,
            drop=self.drop,
            every=self.every,
            server_schedule=self.server_schedule,
        )
        return [float(one) for one in found]


@dataclass(frozen=True)
class RoundPlan:
    """Rounds of equal size: what ``cloister plan`` starts from.

    Attributes:
        noise_multiplier: σ, of the first round.
        sample_rate: q.
        local_steps: steps per round.
        rounds: number of rounds.
        shape: how σ moves over the rounds.
    """

    noise_multiplier: float
    sample_rate: float
    local_steps: int
    rounds: int
    shape: NoiseShape = NoiseShape()

    def __post_init__(self) -> None:
        count(rounds=self.rounds)
        _ = self.event, self.shape.relative(1)

    @property
    def event(self) -> SampledGaussian:
        """What the first round costs."""
        return SampledGaussian(self.noise_multiplier, self.sample_rate, self.local_steps)

    @property
    def is_constant(self) -> bool:
        """Whether every round has the same noise."""
        return self.shape.schedule == "constant"

    def after(self, rounds: int) -> tuple[SampledGaussian, ...]:
        """What the first ``rounds`` rounds cost, as few events as say it; empty before the first."""
        if self.is_constant:
            return (replace(self.event, steps=self.local_steps * rounds),) if rounds else ()
        return self.between(0, rounds)

    def between(self, done: int, rounds: int) -> tuple[SampledGaussian, ...]:
        """What the rounds after the first ``done``, up to ``rounds``, cost."""
        if self.is_constant:
            return self.after(rounds - done)
        relative = self.shape.relative(self.rounds)[done:rounds]
        return tuple(replace(self.event, noise_multiplier=self.noise_multiplier * one) for one in relative)


@dataclass(frozen=True)
class AccountantRow:
    """One accountant's answer.

    Attributes:
        accountant: its name.
        kind: ``certified``, ``upper bound``, ``lower bound`` or ``estimate``.
        epsilon: None where the accountant has no answer.
        note: what to know about it.
    """

    accountant: str
    kind: str
    epsilon: float | None
    note: str


@dataclass(frozen=True)
class CurvePoint:
    """ε after so many rounds."""

    server_round: int
    epsilon: float
    epsilon_rdp: float
    epsilon_estimate: float | None


@dataclass(frozen=True)
class DialRow:
    """What ε becomes when one dial is turned.

    Attributes:
        dial: which setting.
        value: its new value.
        epsilon: the certified ε then.
        change: epsilon over the plan's, minus 1.
    """

    dial: str
    value: float
    epsilon: float
    change: float


@dataclass(frozen=True)
class PlanReport:
    """All that ``cloister plan`` prints.

    Attributes:
        plan: the plan.
        epsilon, delta: the certified cost of the whole plan.
        relation, sampler, unit: what that number means.
        accountants: answers side by side.
        curve: ε after each round (at most ``MOST_POINTS`` points).
        rounds_that_fit: within ``target_epsilon``; None without one.
        noise_multiplier_for_target: σ that just meets it with the planned rounds; None without a target.
        target_epsilon: the budget, if one was given.
        dials: what it costs to turn each dial.
    """

    plan: RoundPlan
    epsilon: float
    delta: float
    relation: str
    sampler: str
    unit: str
    accountants: tuple[AccountantRow, ...]
    curve: tuple[CurvePoint, ...]
    rounds_that_fit: int | None
    noise_multiplier_for_target: float | None
    target_epsilon: float | None
    dials: tuple[DialRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def certified(events: Sequence[SampledGaussian], delta: float, relation: Relation) -> float:
    """The certified ε of a fixed list."""
    return PLDAccountant(relation).compose_all(events).epsilon(delta)


def plan_report(
    plan: RoundPlan, *, target_delta: float, target_epsilon: float | None = None, relation: Relation = "add_remove"
) -> PlanReport:
    """Compute everything that ``cloister plan`` prints.

    Raises:
        ValueError: for a field out of range, or a plan too large to compute soundly.
    """
    whole = plan.after(plan.rounds)
    epsilon = certified(whole, target_delta, known_relation(relation))
    fits = sigma = None
    if target_epsilon is not None:
        budget = positive(target_epsilon=target_epsilon)
        fits = _rounds_that_fit(plan, budget, target_delta, relation)
        sigma = _noise_for(plan, budget, target_delta, relation)
    return PlanReport(
        plan=plan,
        epsilon=epsilon,
        delta=target_delta,
        relation=relation,
        sampler=SAMPLER,
        unit="record",
        accountants=accountant_rows(whole, target_delta, relation),
        curve=tuple(_curve(plan, target_delta, relation)),
        rounds_that_fit=fits,
        noise_multiplier_for_target=sigma,
        target_epsilon=target_epsilon,
        dials=tuple(_dials(plan, epsilon, target_delta, relation)),
    )


def _rounds_that_fit(plan: RoundPlan, epsilon: float, delta: float, relation: Relation) -> int:
    """Rounds within ε; a schedule has no rounds beyond the planned ones."""
    if plan.is_constant:
        return largest_count_meeting(lambda n: certified(plan.after(n), delta, relation), epsilon)
    low, high = 0, plan.rounds
    while low < high:
        middle = (low + high + 1) // 2
        if certified(plan.after(middle), delta, relation) <= epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def _noise_for(plan: RoundPlan, epsilon: float, delta: float, relation: Relation) -> float:
    """σ of the first round that just meets (ε, δ) with the planned rounds."""
    target: dict[str, Any] = {"target_epsilon": epsilon, "target_delta": delta, "relation": relation}
    if plan.is_constant:
        steps = plan.rounds * plan.local_steps
        return calibrate_noise_multiplier(sample_rate=plan.sample_rate, steps=steps, **target)
    relative = plan.shape.relative(plan.rounds)
    return calibrate_factor(relative, steps=plan.local_steps, sample_rate=plan.sample_rate, **target)[0]


def accountant_rows(events: Sequence[SampledGaussian], delta: float, relation: Relation) -> tuple[AccountantRow, ...]:
    """Every accountant's answer to the same list of events."""
    pld = PLDAccountant(relation).compose_all(events)
    tilted = EdgeworthAccountant(2, tilted=True, relation=relation)
    plain = EdgeworthAccountant(2, tilted=False, relation=relation)
    rows = [
        AccountantRow("pld", "certified", pld.epsilon(delta), "opens gates"),
        AccountantRow("pld, lower side", "lower bound", pld.epsilon_lower(delta), "the true ε is not below"),
        AccountantRow("rdp", "upper bound", RDPAccountant(relation).compose_all(events).epsilon(delta), "looser"),
    ]
    if all(event.sample_rate == 1 for event in events):
        exact = gdp_epsilon(composed_mu(events, relation), delta)
        rows.append(AccountantRow("gdp", "exact", exact, "no sampling: one Gaussian"))
    for name, accountant in (("edgeworth, tilted", tilted), ("edgeworth", plain)):
        rows.append(_estimate_row(name, accountant, events, delta))
    return tuple(rows)


def _estimate_row(
    name: str, accountant: EdgeworthAccountant, events: Sequence[SampledGaussian], delta: float
) -> AccountantRow:
    try:
        found = accountant.compose_all(events).estimate(delta)
    except TooLarge as error:
        return AccountantRow(name, "estimate", None, str(error))
    regime = "in regime" if found.in_regime else "no accuracy claimed"
    value = found.epsilon if math.isfinite(found.epsilon) else None
    return AccountantRow(name, "estimate", value, f"order 2, skewness {found.skewness:+.2f}, {regime}; decides nothing")


def _curve(plan: RoundPlan, delta: float, relation: Relation) -> Iterator[CurvePoint]:
    stride = math.ceil(plan.rounds / MOST_POINTS)
    shown = sorted({*range(stride, plan.rounds + 1, stride), plan.rounds})
    pld, rdp, last = PLDAccountant(relation), RDPAccountant(relation), 0
    estimate = EdgeworthAccountant(2, tilted=True, relation=relation)
    for server_round in shown:
        step = plan.between(last, server_round)
        pld, rdp, last = pld.compose_all(step), rdp.compose_all(step), server_round
        try:
            estimate = estimate.compose_all(step)
            guess: float | None = estimate.estimate(delta).epsilon
        except TooLarge:
            guess = None
        yield CurvePoint(server_round, pld.epsilon(delta), rdp.epsilon(delta), guess)


def _dials(plan: RoundPlan, epsilon: float, delta: float, relation: Relation) -> Iterator[DialRow]:
    """Turn one dial at a time: noise by a tenth, the others by a factor of two."""
    turned: list[tuple[str, float, RoundPlan, float]] = []
    for factor in (0.9, 1.1):
        sigma = plan.noise_multiplier * factor
        turned.append(("noise-multiplier", sigma, replace(plan, noise_multiplier=sigma), delta))
    for factor in (0.5, 2.0):
        rate = min(1.0, plan.sample_rate * factor)
        turned.append(("sample-rate", rate, replace(plan, sample_rate=rate), delta))
    for rounds in (max(1, plan.rounds // 2), plan.rounds * 2):
        turned.append(("rounds", rounds, replace(plan, rounds=rounds), delta))
    turned.append(("target-delta", delta / 10, plan, delta / 10))
    for dial, value, other, at in turned:
        try:
            changed = certified(other.after(other.rounds), at, relation)
        except ValueError:
            continue  # the dial leaves the range that is computed; there is no row for it
        yield DialRow(dial, value, changed, changed / epsilon - 1 if epsilon else 0.0)


@dataclass(frozen=True)
class ClientPlan:
    """One organisation's part of a federation.

    Attributes:
        name: of the organisation.
        events: all events it will be charged for, in order.
        target_delta: its δ.
        target_epsilon: its budget, if it has one.
    """

    name: str
    events: tuple[SampledGaussian, ...]
    target_delta: float
    target_epsilon: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", checked(self.events))


@dataclass(frozen=True)
class ClientCost:
    """What one organisation will have spent at the end.

    Attributes:
        name: of the organisation.
        epsilon, delta: certified (PLD); the same number the run's own accountant gives for these events.
        epsilon_rdp: the Rényi bound beside it.
        target_epsilon: its budget, if one was given.
        fits: whether ε stays within it; None without a budget.
        rounds: how many events.
        epsilon_by_round: certified ε after each event.
    """

    name: str
    epsilon: float
    delta: float
    epsilon_rdp: float
    target_epsilon: float | None
    fits: bool | None
    rounds: int
    epsilon_by_round: tuple[float, ...]


@dataclass(frozen=True)
class FederationReport:
    """What a whole federation will cost.

    Attributes:
        clients: one row each.
        epsilon: the largest ε of a client: what holds for a person who is in one organisation only.
        relation, sampler, unit: what the numbers mean.
    """

    clients: tuple[ClientCost, ...]
    epsilon: float
    relation: str
    sampler: str
    unit: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def federation_report(clients: Sequence[ClientPlan], *, relation: Relation = "add_remove") -> FederationReport:
    """Compute what every client of a federation will have spent.

    Raises:
        ValueError: if there is no client, or a client's list cannot be computed soundly.
    """
    if not clients:
        raise ValueError("clients must not be empty")
    costs = tuple(_client_cost(client, known_relation(relation)) for client in clients)
    return FederationReport(costs, max(cost.epsilon for cost in costs), relation, SAMPLER, "record")


def _client_cost(client: ClientPlan, relation: Relation) -> ClientCost:
    pld, by_round = PLDAccountant(relation), []
    for event in client.events:
        pld = pld.compose(event)
        by_round.append(pld.epsilon(client.target_delta))
    epsilon = by_round[-1] if by_round else 0.0
    return ClientCost(
        name=client.name,
        epsilon=epsilon,
        delta=client.target_delta,
        epsilon_rdp=RDPAccountant(relation).compose_all(client.events).epsilon(client.target_delta),
        target_epsilon=client.target_epsilon,
        fits=None if client.target_epsilon is None else epsilon <= client.target_epsilon,
        rounds=len(client.events),
        epsilon_by_round=tuple(by_round),
    )
