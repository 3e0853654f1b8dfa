from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from common.messages import Envelope, Plan, RefusalReason, Reservation, SignedReservation, TrainRequest, adapter_hash
from common.privacy import SampledGaussian
from common.signing import SigningKey

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=4)
ADAPTER = {"a.lora_B": np.zeros((4, 2), np.float32), "b.lora_B": np.ones((3, 2), np.float32)}
SHAPES = {name: array.shape for name, array in ADAPTER.items()}
NOW = 1_800_000_000.0
COSTLY = SampledGaussian(noise_multiplier=0.5, sample_rate=0.05, steps=8)

PLANS = {
    "lower-noise-than-the-envelope": ({"event": SampledGaussian(0.9, 0.01, 4)}, RefusalReason.ENVELOPE),
    "more-steps-than-the-envelope": (
        {"event": SampledGaussian(1.0, 0.01, 5), "local_steps": 5},
        RefusalReason.ENVELOPE,
    ),
    "larger-rate-than-the-envelope": ({"event": SampledGaussian(1.0, 0.02, 4)}, RefusalReason.ENVELOPE),
    "a-place-outside-the-envelope": ({"participation": 3}, RefusalReason.ENVELOPE),
    "less-noise-than-the-policy": ({"event": SampledGaussian(0.4, 0.01, 4)}, RefusalReason.POLICY),
    "larger-rate-than-the-policy": ({"event": SampledGaussian(1.0, 0.06, 4)}, RefusalReason.POLICY),
    "more-steps-than-the-policy": ({"event": SampledGaussian(1.0, 0.01, 9), "local_steps": 9}, RefusalReason.POLICY),
    "an-unaffordable-envelope": (
        {"event": COSTLY, "local_steps": 8, "envelope": Envelope((COSTLY,) * 9)},
        RefusalReason.BUDGET,
    ),
    "more-local-steps-than-paid-for": ({"local_steps": 5}, RefusalReason.PLAN),
    "no-clipping": ({"clipping_norm": 0.0}, RefusalReason.PLAN),
    "a-norm-below-what-float32-can-square": ({"clipping_norm": 1e-30}, RefusalReason.PLAN),
    "no-privacy": ({"event": None}, RefusalReason.POLICY),
    "another-client": ({"client": "clinic-b"}, RefusalReason.POLICY),
    "an-unknown-data-set": ({"dataset": "other"}, RefusalReason.POLICY),
    "another-declared-size": ({"declared_records": 999}, RefusalReason.POLICY),
    "another-backbone": ({"backbone_hash": "c" * 64}, RefusalReason.BACKBONE),
    "another-adapter": ({"adapter_hash": "d" * 64}, RefusalReason.ADAPTER),
    "a-negative-place": ({"participation": -1}, RefusalReason.PLAN),
    "a-batch-of-nothing": ({"expected_batch_size": 0.0}, RefusalReason.PLAN),
    "a-round-before-the-first": ({"server_round": 0}, RefusalReason.PLAN),
    "a-text-for-a-number": ({"local_steps": "4"}, RefusalReason.PLAN),
}  # fmt: skip


class Parties:
    """A coordinator with its accountant, and a client: keys, requests and guards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator, self.accountant, self.client = (SigningKey.generate() for _ in range(3))
        self.guards: list[Guard] = []
        self.count = 0

    def policy(self, **changes: Any) -> Policy:
        values: dict[str, Any] = {
            "organisation": "clinic-a",
            "datasets": {"notes": DatasetPolicy(declared_records=1000, target_epsilon=2.0)},
            "min_noise_multiplier": 0.5,
            "max_sample_rate": 0.05,
            "max_steps_per_round": 8,
            "backbones": ("b" * 64,),
            "coordinator_keys": (self.coordinator.public_key,),
            "accountant_keys": (self.accountant.public_key,),
        }
        return Policy(**{**values, **changes})

    def guard(self, policy: Policy | None = None, **changes: Any) -> Guard:
        guard = Guard(policy or self.policy(**changes), self.folder / "own.sqlite", key=self.client, clock=lambda: NOW)
        self.guards.append(guard)
        return guard

    def restart(self, **changes: Any) -> Guard:
        """The same ledger after the process ended; nothing was closed in an orderly way but the lock."""
        self.guards[-1].close()
        return self.guard(**changes)

    def plan(self, **changes: Any) -> Plan:
        values: dict[str, Any] = {
            "run_id": "run",
            "server_round": 1,
            "client": "clinic-a",
            "dataset": "notes",
            "attempt": 1,
            "participation": 0,
            "event": EVENT,
            "local_steps": EVENT.steps,
            "clipping_norm": 1.0,
            "expected_batch_size": 10.0,
            "declared_records": 1000,
            "optimizer": "adam",
            "learning_rate": 0.01,
            "aggregation": "ffa",
            "backbone_hash": "b" * 64,
            "adapter_hash": adapter_hash(ADAPTER),
            "envelope": Envelope((EVENT,) * 3),
        }
        return Plan(**{**values, **changes})

    def request(
        self, plan: Plan | None = None, *, reservation: dict[str, Any] | None = None, **changes: Any
    ) -> TrainRequest:
        """A request as an honest coordinator makes it; ``changes`` go into the plan, ``reservation`` into that."""
        plan = plan or self.plan(**changes)
        self.count += 1
        names = ("run_id", "server_round", "client", "dataset", "attempt", "event")
        values = {"reservation_id": f"{self.count:032x}", **{name: getattr(plan, name) for name in names}}
        signed = self.sign_reservation(Reservation(**{**values, **(reservation or {})}))
        return TrainRequest(plan, self.coordinator.sign("plan", plan.to_json()), signed, ADAPTER)

    def sign_reservation(self, reservation: Reservation, key: SigningKey | None = None) -> SignedReservation:
        key = key or self.accountant
        head = "a" * 64
        return SignedReservation(
            reservation, key.sign("reservation", reservation.to_json()), head, key.sign("head", {"head": head})
        )

    def train(self, guard: Guard, request: TrainRequest, value: float = 1.0):
        """Admit, start and finish; the reply."""
        admission = guard.admit(request, shapes=SHAPES)
        guard.start(admission.request)
        return guard.finish(request, update(value))


def update(value: float) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def with_plan(request: TrainRequest, parties: Parties, **changes: Any) -> TrainRequest:
    """The same reservation under another plan, signed by the coordinator: what a liar would send."""
    plan = replace(request.plan, **changes)
    return replace(request, plan=plan, plan_signature=parties.coordinator.sign("plan", plan.to_json()))


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Parties]:
    parties = Parties(tmp_path)
    yield parties
    for guard in parties.guards:
        guard.close()


@pytest.fixture
def guard(parties: Parties) -> Guard:
    return parties.guard()


@pytest.fixture
def change() -> Callable[..., TrainRequest]:
    return with_plan


@pytest.fixture(params=PLANS)
def lie(request: pytest.FixtureRequest) -> tuple[dict[str, Any], RefusalReason]:
    """What a lying coordinator writes into a plan, and the reason for which it is refused."""
    return PLANS[request.param]
