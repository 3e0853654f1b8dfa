"""Which accountant is valid for which plan, and the one door through which a number reaches a budget.

>>> plan = Plan(events=(SampledGaussian(1.0, 0.01, 100),), choice="adaptive")
>>> plan.valid_accountants()
('renyi_filter',)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from common.privacy import checks
from common.privacy.events import SampledGaussian, checked
from common.privacy.filters import GDPFilter, RenyiFilter, best_order
from common.privacy.pld import PLDAccountant
from common.privacy.rdp import RDPAccountant

Choice = Literal["fixed", "envelope", "adaptive"]
CHOICES: Final[tuple[str, ...]] = get_args(Choice)


@dataclass(frozen=True)
class Plan:
    """A list of events together with who chose it, and when.

    Attributes:
        events: the events; for an envelope, its worst cases.
        choice: ``fixed`` — the list is fixed before the first round, or drawn without looking at any output;
            ``envelope`` — each round is chosen along the way, but stays below its entry of ``events``;
            ``adaptive`` — noise, sampling, steps or stopping depend on earlier outputs, and ``events`` is one path.
        relation: neighbouring relation.
    """

    events: tuple[SampledGaussian, ...]
    choice: Choice = "fixed"
    relation: checks.Relation = "add_remove"

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", checked(self.events))
        checks.known_relation(self.relation)
        if self.choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {self.choice!r}")

    def valid_accountants(self) -> tuple[str, ...]:
        """Return the names of the accountants whose statement holds for this plan, the tightest first."""
        unsampled = all(event.sample_rate == 1 for event in self.events)
        if self.choice == "adaptive":
            return ("gdp_filter", "renyi_filter") if unsampled else ("renyi_filter",)
        return ("gdp", "pld", "rdp") if unsampled else ("pld", "rdp")

    def accountant(self) -> PLDAccountant:
        """Return the PLD accountant of the list (of the worst cases, for an envelope).

        Raises:
            ValueError: for an adaptive plan: path-wise PLD proves nothing there.
        """
        if self.choice == "adaptive":
            raise ValueError(
                "choice is 'adaptive': composing the events of one path by PLD is not valid when later events depend "
                "on earlier outputs; use a filter fixed in advance (Plan.filter) or an envelope"
            )
        return PLDAccountant(self.relation).compose_all(self.events)

    def filter(self, target_epsilon: float, target_delta: float) -> GDPFilter | RenyiFilter:
        """Return an empty filter that is valid for this plan; the Rényi order is taken from ``events``, now."""
        if all(event.sample_rate == 1 for event in self.events):
            return GDPFilter(target_epsilon, target_delta, self.relation)
        order = best_order(
            self.events, target_epsilon=target_epsilon, target_delta=target_delta, relation=self.relation
        )
        return RenyiFilter(order, target_epsilon, target_delta, self.relation)


def certified_epsilon(accountant: object, delta: float) -> float:
    """Return the ε that a budget decision may read.

    Only upper bounds pass: a PLD or an RDP accountant. An Edgeworth estimate, another library's number, or a bare
    float does not.

    Raises:
        TypeError: for anything else.
    """
    if type(accountant) not in (PLDAccountant, RDPAccountant):
        raise TypeError(
            f"a budget reads certified bounds only (PLDAccountant, RDPAccountant), not {type(accountant).__name__}"
        )
    assert isinstance(accountant, PLDAccountant | RDPAccountant)  # noqa: S101 - for the type checker; checked above
    return accountant.epsilon(delta)


def may_spend(
    accountant: object, asked: Iterable[SampledGaussian], *, target_epsilon: float, target_delta: float
) -> bool:
    """Return whether ``asked`` on top of ``accountant`` stays within the target.

    Raises:
        TypeError: if ``accountant`` is not one of the certified ones (see :func:`certified_epsilon`).
    """
    target = checks.positive(target_epsilon=target_epsilon)
    certified_epsilon(accountant, target_delta)
    assert isinstance(accountant, PLDAccountant | RDPAccountant)  # noqa: S101 - for the type checker; checked above
    return accountant.compose_all(asked).epsilon(target_delta) <= target


class Contradiction(ArithmeticError):
    """Two sound accountants contradict each other: one of them is wrong, and neither number may be used."""


@dataclass(frozen=True)
class Certified:
    """One list of events, by two independent upper bounds and a lower one.

    Attributes:
        epsilon: the certified ε (PLD).
        epsilon_rdp: the Rényi bound.
        epsilon_lower: the lower side of the PLD.
        delta: at this δ.
    """

    epsilon: float
    epsilon_rdp: float
    epsilon_lower: float
    delta: float


def cross_checked(plan: Plan, delta: float) -> Certified:
    """Return the certified ε of a plan after confronting PLD and RDP.

    Raises:
        Contradiction: if the Rényi bound lies below the PLD's lower side.
        ValueError: for an adaptive plan (see :meth:`Plan.accountant`), or δ out of range.
    """
    pld = plan.accountant()
    by_rdp = RDPAccountant(plan.relation).compose_all(plan.events).epsilon(delta)
    found = Certified(pld.epsilon(delta), by_rdp, pld.epsilon_lower(delta), delta)
    if found.epsilon_rdp < found.epsilon_lower or found.epsilon < found.epsilon_lower:
        raise Contradiction(f"upper bounds below a lower bound: {found}; no number of this plan may be used")
    return found
