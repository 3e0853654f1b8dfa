"""``cloister calibrate``: the noise that meets a target, and what it saves against Rényi accounting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.privacy import RDPAccountant, SampledGaussian
from common.privacy.calibrate import calibrate_noise_multiplier, calibrate_sample_rate, calibrate_steps
from common.privacy.checks import Relation, count, known_relation
from common.privacy.schedules import calibrate_factor
from deploy.planning.plan import SAMPLER, NoiseShape, certified

CONSTANT = NoiseShape()
"""The same noise in every round."""


@dataclass(frozen=True)
class CalibrationReport:
    """All that ``cloister calibrate`` prints.

    Attributes:
        target_epsilon, target_delta, relation, sampler, unit: the target and what it means.
        sample_rate, local_steps, rounds: the planned rounds.
        noise_multiplier: the smallest σ that meets the target, by PLD.
        epsilon: certified at that σ.
        noise_multiplier_rdp: what Rényi accounting would ask for.
        noise_saved: 1 − noise_multiplier / noise_multiplier_rdp.
        noise_schedule: the shape over the rounds; ``noise_multiplier``, its comparison with RDP, and what is allowed
            at RDP's noise are those of constant noise.
        noise_multipliers: σ of each round.
        steps_at_rdp_noise: how many steps PLD allows with the noise that RDP asks for.
        sample_rate_at_rdp_noise: how large q may be with it.
    """

    target_epsilon: float
    target_delta: float
    relation: str
    sampler: str
    unit: str
    sample_rate: float
    local_steps: int
    rounds: int
    noise_multiplier: float
    epsilon: float
    noise_multiplier_rdp: float
    noise_saved: float
    noise_schedule: str
    noise_multipliers: tuple[float, ...]
    steps_at_rdp_noise: int
    sample_rate_at_rdp_noise: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def calibration_report(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    rounds: int,
    local_steps: int = 1,
    relation: Relation = "add_remove",
    shape: NoiseShape = CONSTANT,
) -> CalibrationReport:
    """Compute everything that ``cloister calibrate`` prints.

    Raises:
        ValueError: for a field out of range, or a target that no noise meets.
    """
    steps = count(rounds=rounds) * count(local_steps=local_steps)
    target: dict[str, Any] = {
        "target_epsilon": target_epsilon,
        "target_delta": target_delta,
        "relation": known_relation(relation),
    }
    sigma = calibrate_noise_multiplier(sample_rate=sample_rate, steps=steps, **target)
    by_rdp = calibrate_noise_multiplier(sample_rate=sample_rate, steps=steps, accountant=RDPAccountant, **target)
    epsilon = certified((SampledGaussian(sigma, sample_rate, steps),), target_delta, relation)
    sigmas: tuple[float, ...] = (sigma,) * rounds
    if shape.schedule != "constant":
        relative = shape.relative(rounds)
        factor, epsilon = calibrate_factor(relative, steps=local_steps, sample_rate=sample_rate, **target)
        sigmas = tuple(factor * one for one in relative)
    return CalibrationReport(
        sampler=SAMPLER,
        unit="record",
        sample_rate=sample_rate,
        local_steps=local_steps,
        rounds=rounds,
        noise_multiplier=sigma,
        epsilon=epsilon,
        noise_multiplier_rdp=by_rdp,
        noise_saved=1 - sigma / by_rdp,
        noise_schedule=shape.schedule,
        noise_multipliers=sigmas,
        steps_at_rdp_noise=calibrate_steps(noise_multiplier=by_rdp, sample_rate=sample_rate, **target),
        sample_rate_at_rdp_noise=calibrate_sample_rate(noise_multiplier=by_rdp, steps=steps, **target),
        **target,
    )
