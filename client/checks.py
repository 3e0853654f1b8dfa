"""The public facts that a request must satisfy, each checked by a function that reads no record.

Each returns the reason to refuse, or None. Nothing of a request is believed, types included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np

from client.policy import AllowedMethods, Policy
from common.errors import InvalidInput, Refused
from common.mechanism import LEAST_CLIPPING, Mechanism
from common.messages import Plan, RefusalReason, TrainRequest, adapter_hash
from common.privacy import SampledGaussian
from common.recipe import recipe_hash
from common.signing import canonical, verify
from common.text import shown

log = logging.getLogger(__name__)

Finding = RefusalReason
"""Why a request is refused."""

_TEXTS = ("run_id", "client", "dataset", "optimizer", "aggregation", "backbone_hash", "adapter_hash", "recipe_hash")
_COUNTS = ("server_round", "attempt", "local_steps", "declared_records")
_NUMBERS = ("clipping_norm", "expected_batch_size", "learning_rate")


def coordinator_of(request: TrainRequest, policy: Policy) -> str | None:
    """The pinned coordinator key that signed the plan, when a pinned accountant signed reservation and head too.

    Raises:
        InvalidInput: the plan has no canonical form, so that nothing can have been signed.
    """
    signed = request.reservation
    try:
        plan, reservation = request.plan.to_json(), signed.reservation.to_json()
        canonical([plan, reservation, signed.accountant_head])
        coordinator = _signer(policy.coordinator_keys, "plan", plan, request.plan_signature)
        accountant = _signer(policy.accountant_keys, "reservation", reservation, signed.signature)
        if coordinator is None or accountant is None:
            return None
        head = {"head": signed.accountant_head}
        return coordinator if _signer((accountant,), "head", head, signed.accountant_head_signature) else None
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"this request is malformed: {error}") from error


def _signer(keys: tuple[str, ...], kind: str, body: Mapping[str, object], signature: str) -> str | None:
    for key in keys:
        try:
            verify(key, kind, body, signature)
        except Refused:
            continue
        return key
    return None


def check_agreement(request: TrainRequest) -> Finding | None:
    """Plan and reservation speak of one round of one client, and the plan is well formed."""
    plan, reservation = request.plan, request.reservation.reservation
    for name in ("run_id", "server_round", "client", "dataset", "attempt", "event"):
        if getattr(plan, name) != getattr(reservation, name):
            return RefusalReason.PLAN
    return None if _is_well_formed(plan) else RefusalReason.PLAN


def _is_well_formed(plan: Plan) -> bool:
    texts = all(isinstance(getattr(plan, name), str) for name in _TEXTS)
    counts = all(type(getattr(plan, name)) is int and getattr(plan, name) >= 1 for name in _COUNTS)
    places = type(plan.participation) is int and plan.participation >= 0
    numbers = all(
        type(getattr(plan, name)) in (int, float) and math.isfinite(getattr(plan, name)) and getattr(plan, name) >= 0
        for name in _NUMBERS
    )
    if not (texts and counts and places and numbers and plan.expected_batch_size > 0 and plan.learning_rate > 0):
        return False
    if not isinstance(plan.mechanism, Mechanism):
        return False
    if plan.event is None:
        return plan.mechanism.problem(None) is None
    if not isinstance(plan.event, SampledGaussian) or plan.event.steps != plan.local_steps:
        return False
    return plan.clipping_norm >= LEAST_CLIPPING and plan.mechanism.problem(plan.event.noise_multiplier) is None


def check_policy(plan: Plan, policy: Policy, now: float) -> Finding | None:
    """The organisation allows this: client, data set, declared size, backbone, noise, rate, steps, methods, date.

    The limit that stands against it is told to the organisation's own log; a refusal says the reason's name alone.
    """
    broken = next(_broken_limits(plan, policy, now), "")
    if broken:
        _tell(plan, broken)
        return RefusalReason.POLICY
    return None if plan.backbone_hash in policy.backbones else RefusalReason.BACKBONE


def _broken_limits(plan: Plan, policy: Policy, now: float) -> Iterator[str]:
    """In words, each limit that the plan breaks: the setting, and what was asked; the first decides."""
    if policy.has_expired(now):
        yield f"expires = {policy.expires} has passed"
    if plan.client != policy.organisation:
        yield f"organisation = {policy.organisation}, asked for {shown(plan.client)}"
    allowed = policy.datasets.get(plan.dataset)
    if allowed is None:
        yield f"it names no data set {shown(plan.dataset)}"
        return
    if plan.declared_records != allowed.declared_records:
        yield f"declared-records = {allowed.declared_records}, asked for {plan.declared_records}"
    if plan.local_steps > policy.max_steps_per_round:
        yield f"max-steps-per-round = {policy.max_steps_per_round}, asked for {plan.local_steps}"
    event = plan.event
    if event is None:
        if not allowed.without_privacy:
            yield "without-privacy = false, asked for training without noise"
        return
    if event.noise_multiplier < policy.min_noise_multiplier:
        yield f"min-noise-multiplier = {policy.min_noise_multiplier}, asked for {event.noise_multiplier}"
    if event.sample_rate > policy.max_sample_rate:
        yield f"max-sample-rate = {policy.max_sample_rate}, asked for {event.sample_rate}"
    asked = {
        "clipping": plan.mechanism.clipping,
        "noise_allocation": plan.mechanism.noise_allocation,
        "aggregation": plan.aggregation,
        "optimizer": plan.optimizer,
    }
    for name, word in asked.items():
        if not policy.allowed_methods.allow(**{name: word}):
            yield f"allowed-methods has no {name.replace('_', '-')} {shown(word)}"


def check_adapter(request: TrainRequest, shapes: Mapping[str, tuple[int, ...]]) -> Finding | None:
    """The adapter is the planned one, of the trainer's own names and shapes, float32 and finite; so are scales."""
    adapter = request.adapter
    scaled = [name for name, _ in request.plan.mechanism.scales]
    if scaled and scaled != sorted(shapes):
        return RefusalReason.PLAN
    if {name: tuple(array.shape) for name, array in adapter.items()} != {n: tuple(s) for n, s in shapes.items()}:
        return RefusalReason.ADAPTER
    if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in adapter.values()):
        return RefusalReason.ADAPTER
    return None if adapter_hash(adapter) == request.plan.adapter_hash else RefusalReason.ADAPTER


def check_recipe(plan: Plan, recipe: Mapping[str, str], allowed: AllowedMethods) -> Finding | None:
    """The plan names the trainer's recipe, which is an allowed one, and says nothing that it contradicts.

    A plan that says ``ffa`` to a trainer of A and B would pass a policy that allows ``ffa`` alone; and in a subspace or
    behind gradient carriers there is no noise per module, which must be said before training has started and the
    reservation is spent.
    """
    kind = recipe.get("reparametrization", "lora")
    if not allowed.allow(reparametrization=kind):
        _tell(plan, f"allowed-methods has no reparametrization {shown(kind)}")
        return RefusalReason.POLICY
    if plan.recipe_hash != recipe_hash(recipe) or plan.aggregation != recipe.get("aggregation", plan.aggregation):
        return RefusalReason.RECIPE
    is_mixed = recipe.get("subspace", "none") != "none" or kind != "lora"
    return RefusalReason.RECIPE if is_mixed and plan.mechanism.noise_allocation != "uniform" else None


def _tell(plan: Plan, broken: str) -> None:
    """Public facts only: the organisation's policy, and what was asked for."""
    log.warning("the policy forbids this plan: %s", broken, extra={"run": shown(plan.run_id)})
