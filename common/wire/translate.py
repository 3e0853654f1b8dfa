"""The one place where messages of the network become our values, and ours become messages.

Inwards nothing is guessed: an absent part, the zero of an enumeration, a value out of range or an envelope of absurd
length is ``InvalidInput`` (gRPC INVALID_ARGUMENT). What comes out of ``read_*`` is well formed; whether it is *allowed*
is for accountant and guard to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import groupby
from typing import Any, ParamSpec, TypeVar

import numpy as np

from common.accounts import Answer, Ask, Budget, Denial, OpenReservation, Outcome, Registration, Spent
from common.certificate import Attested
from common.errors import InvalidInput
from common.history import ClientHistory, SignedHistory
from common.ledger import Entry, Row
from common.messages import (
    Arrays,
    Description,
    Envelope,
    Plan,
    Refusal,
    RefusalReason,
    Reply,
    Reservation,
    SignedReservation,
    Status,
    StatusCode,
    TrainRequest,
)
from common.privacy import SampledGaussian
from common.signing import canonical
from common.wire import accountant_pb2, messages_pb2, trainer_pb2

LONGEST_ENVELOPE = 100_000
"""Participations in one run; more than any run has rounds."""

P = ParamSpec("P")
T = TypeVar("T")


def _strict(read: Callable[P, T]) -> Callable[P, T]:
    """What a constructor of ours refuses, the sender got wrong."""

    @wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except InvalidInput:
            raise
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidInput(f"malformed message: {error}") from error

    return reading


def _enumeration(message: Any, prefix: str, kind: type[T]) -> tuple[dict[int, T], dict[T, int]]:
    """Both directions between a wire enumeration and ours; the wire's zero has no counterpart."""
    inwards = {
        number: kind(name.removeprefix(prefix).lower())  # type: ignore[call-arg]
        for name, number in message.items()
        if number != 0
    }
    return inwards, {ours: number for number, ours in inwards.items()}


_REASONS, _REASON_NUMBERS = _enumeration(messages_pb2.RefusalReason, "REFUSAL_REASON_", RefusalReason)
_OUTCOMES, _OUTCOME_NUMBERS = _enumeration(accountant_pb2.Outcome, "OUTCOME_", Outcome)
_STATUSES, _STATUS_NUMBERS = _enumeration(trainer_pb2.StatusCode, "STATUS_CODE_", StatusCode)
_DENIALS, _DENIAL_NUMBERS = _enumeration(accountant_pb2.DenialReason, "DENIAL_REASON_", str)


def _known(table: Mapping[int, T], number: int, what: str) -> T:
    if number not in table:
        raise InvalidInput(f"{what} {number} is not known here")
    return table[number]


def _present(message: Any, *names: str) -> None:
    for name in names:
        if not message.HasField(name):
            raise InvalidInput(f"{message.DESCRIPTOR.name}: {name} is missing")


def _named(**texts: str) -> None:
    for name, text in texts.items():
        if not text or len(text) > 256 or any(ord(letter) < 32 for letter in text):
            raise InvalidInput(f"{name} must be 1 to 256 printable characters")


# --- shared -----------------------------------------------------------------------------------------------------------


def write_event(event: SampledGaussian | None) -> messages_pb2.SampledGaussian | None:
    """None stays absent."""
    if event is None:
        return None
    return messages_pb2.SampledGaussian(
        noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate, steps=event.steps
    )


@_strict
def read_event(message: Any) -> SampledGaussian | None:
    """The event of a message that may have one."""
    if not message.HasField("event"):
        return None
    event = message.event
    return SampledGaussian(event.noise_multiplier, event.sample_rate, event.steps)


def write_envelope(envelope: Envelope) -> messages_pb2.Envelope:
    """Equal participations in a row are one part."""
    parts = [
        messages_pb2.EnvelopePart(event=write_event(event), count=sum(1 for _ in run))
        for event, run in groupby(envelope.events)
    ]
    return messages_pb2.Envelope(parts=parts)


@_strict
def read_envelope(message: messages_pb2.Envelope) -> Envelope:
    """At most ``LONGEST_ENVELOPE`` participations, each with an event."""
    if sum(part.count for part in message.parts) > LONGEST_ENVELOPE:
        raise InvalidInput(f"an envelope has at most {LONGEST_ENVELOPE} participations")
    events: list[SampledGaussian] = []
    for part in message.parts:
        _present(part, "event")
        event = read_event(part)
        events += [event] * part.count if event is not None else []
    return Envelope(tuple(events))


def write_signed(signed: SignedReservation) -> messages_pb2.SignedReservation:
    """A reservation with its signatures."""
    own = signed.reservation
    reservation = messages_pb2.Reservation(
        reservation_id=own.reservation_id,
        run_id=own.run_id,
        server_round=own.server_round,
        client=own.client,
        dataset=own.dataset,
        attempt=own.attempt,
        event=write_event(own.event),
    )
    return messages_pb2.SignedReservation(
        reservation=reservation,
        signature=signed.signature,
        accountant_head=signed.accountant_head,
        accountant_head_signature=signed.accountant_head_signature,
    )


@_strict
def read_signed(message: messages_pb2.SignedReservation) -> SignedReservation:
    """The inverse of ``write_signed``; the signatures are not checked here."""
    _present(message, "reservation")
    own = message.reservation
    _named(reservation_id=own.reservation_id, run_id=own.run_id, client=own.client, dataset=own.dataset)
    reservation = Reservation(
        own.reservation_id, own.run_id, own.server_round, own.client, own.dataset, own.attempt, read_event(own)
    )
    return SignedReservation(reservation, message.signature, message.accountant_head, message.accountant_head_signature)


def write_refusal(refusal: Refusal) -> messages_pb2.Refusal:
    """A signed no."""
    return messages_pb2.Refusal(
        reservation_id=refusal.reservation_id,
        request_hash=refusal.request_hash,
        reason=_REASON_NUMBERS[refusal.reason],
        voiding=refusal.voiding,
        signature=refusal.signature,
    )


@_strict
def read_refusal(message: messages_pb2.Refusal) -> Refusal:
    """The inverse of ``write_refusal``; the signature is not checked here."""
    reason = _known(_REASONS, message.reason, "refusal reason")
    return Refusal(message.reservation_id, message.request_hash, reason, message.voiding, message.signature)


# --- accountant -------------------------------------------------------------------------------------------------------


def write_registration(client: str, registration: Registration) -> accountant_pb2.Registration:
    """One client's part in a run."""
    budget = registration.budget
    return accountant_pb2.Registration(
        client=client,
        dataset=registration.dataset,
        budget=None if budget is None else accountant_pb2.Budget(**vars(budget)),
        envelope=write_envelope(registration.envelope),
        public_key=registration.public_key,
        group=registration.group or "",
    )


@_strict
def read_registrations(messages: Iterable[accountant_pb2.Registration]) -> dict[str, Registration]:
    """By client; a client that is there twice is refused."""
    found: dict[str, Registration] = {}
    for message in messages:
        _named(client=message.client, dataset=message.dataset, public_key=message.public_key)
        if message.client in found:
            raise InvalidInput(f"{message.client} is registered twice")
        found[message.client] = Registration(
            message.dataset,
            _read_budget(message.budget) if message.HasField("budget") else None,
            read_envelope(message.envelope),
            message.public_key,
            message.group or None,
        )
    return found


def _read_budget(message: accountant_pb2.Budget) -> Budget:
    _named(relation=message.relation, unit=message.unit)
    return Budget(
        message.target_epsilon,
        message.target_delta,
        message.relation,
        message.unit,
        message.lifetime_epsilon if message.HasField("lifetime_epsilon") else None,
        message.lifetime_delta if message.HasField("lifetime_delta") else None,
    )


def write_ask(ask: Ask) -> accountant_pb2.Ask:
    """One client's part of Reserve."""
    return accountant_pb2.Ask(client=ask.client, event=write_event(ask.event), attempt=ask.attempt)


@_strict
def read_ask(message: accountant_pb2.Ask) -> Ask:
    """The inverse of ``write_ask``."""
    _named(client=message.client)
    return Ask(message.client, read_event(message), message.attempt)


def write_answer(answer: Answer) -> accountant_pb2.ReserveResponse:
    """Grants and denials."""
    granted = [
        accountant_pb2.Grant(
            signed=write_signed(signed), participation=answer.participation[signed.reservation.reservation_id]
        )
        for signed in answer.granted
    ]
    denied = [
        accountant_pb2.Denial(
            client=item.client,
            spent=item.spent,
            asked=item.asked,
            left=item.left,
            reason=_DENIAL_NUMBERS[item.reason],
        )
        for item in answer.denied
    ]
    return accountant_pb2.ReserveResponse(granted=granted, denied=denied)


@_strict
def read_answer(message: accountant_pb2.ReserveResponse) -> Answer:
    """The inverse of ``write_answer``."""
    granted = tuple(read_signed(item.signed) for item in message.granted)
    denied = tuple(
        Denial(item.client, item.spent, item.asked, item.left, _known(_DENIALS, item.reason, "denial reason"))
        for item in message.denied
    )
    places = {item.signed.reservation.reservation_id: item.participation for item in message.granted}
    return Answer(granted, denied, places)


def write_outcomes(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """By reservation id."""
    return {reservation_id: _OUTCOME_NUMBERS[Outcome(outcome)] for reservation_id, outcome in outcomes.items()}


@_strict
def read_outcomes(outcomes: Mapping[str, int]) -> dict[str, Outcome]:
    """The inverse of ``write_outcomes``."""
    return {reservation_id: _known(_OUTCOMES, number, "outcome") for reservation_id, number in outcomes.items()}


def write_history(signed: SignedHistory, *, public_key: str, coordinator: str) -> accountant_pb2.ReconcileRequest:
    """A client's signed list, as the bytes that were signed."""
    return accountant_pb2.ReconcileRequest(
        history=canonical(signed.history.to_json()).decode(),
        signature=signed.signature,
        public_key=public_key,
        coordinator=coordinator,
    )


@_strict
def read_history(message: accountant_pb2.ReconcileRequest) -> SignedHistory:
    """The inverse of ``write_history``; the signature is not checked here."""
    _named(public_key=message.public_key, coordinator=message.coordinator)
    value = json.loads(message.history)
    if not isinstance(value, dict):
        raise InvalidInput("a history is a JSON object")
    return SignedHistory(ClientHistory.from_json(value), message.signature)


def write_open(found: Iterable[OpenReservation]) -> accountant_pb2.OpenResponse:
    """Reservations without an outcome."""
    items = [accountant_pb2.OpenReservation(signed=write_signed(one.signed), sending=one.sending) for one in found]
    return accountant_pb2.OpenResponse(reservations=items)


@_strict
def read_open(message: accountant_pb2.OpenResponse) -> tuple[OpenReservation, ...]:
    """The inverse of ``write_open``."""
    return tuple(OpenReservation(read_signed(item.signed), item.sending) for item in message.reservations)


def write_spent(
    spent: Spent, counting: Iterable[Attested], next_participation: int, next_attempt: int
) -> accountant_pb2.BudgetResponse:
    """What one client has spent in one run; the events are those of ``counting``."""
    listed = [
        accountant_pb2.Attested(
            reservation_id=item.reservation_id,
            server_round=item.server_round,
            participation=item.participation,
            event=write_event(item.event),
        )
        for item in counting
    ]
    return accountant_pb2.BudgetResponse(
        epsilon=spent.epsilon,
        epsilon_rdp=spent.epsilon_rdp,
        target_epsilon=spent.target_epsilon,
        target_delta=spent.target_delta,
        counting=listed,
        next_participation=next_participation,
        next_attempt=next_attempt,
    )


@_strict
def read_spent(message: accountant_pb2.BudgetResponse) -> tuple[Spent, tuple[Attested, ...]]:
    """The inverse of ``write_spent``, without the two counters."""
    counting = tuple(
        Attested(item.reservation_id, item.server_round, item.participation, read_event(item))
        for item in message.counting
    )
    events = tuple(item.event for item in counting if item.event is not None)
    numbers = (message.epsilon, message.epsilon_rdp, message.target_epsilon, message.target_delta)
    return Spent(events, *numbers), counting


def write_line(entry: Entry) -> accountant_pb2.LedgerLine:
    """A ledger line, exactly as stored."""
    return accountant_pb2.LedgerLine(**entry.row()._asdict())


@_strict
def read_line(message: accountant_pb2.LedgerLine) -> Row:
    """The inverse of ``write_line``."""
    key = message.key if message.HasField("key") else None
    return Row(
        message.seq,
        message.time_us,
        message.kind,
        message.scope,
        key,
        message.body,
        message.salt,
        message.previous,
        message.hash,
    )


# --- trainer ----------------------------------------------------------------------------------------------------------


def write_arrays(arrays: Arrays) -> list[trainer_pb2.Tensor]:
    """In the order of the names."""
    return [
        trainer_pb2.Tensor(
            name=name, shape=arrays[name].shape, data=np.ascontiguousarray(arrays[name], dtype="<f4").tobytes()
        )
        for name in sorted(arrays)
    ]


@_strict
def read_arrays(messages: Iterable[trainer_pb2.Tensor]) -> Arrays:
    """Raw numbers and nothing else: no pickle, no other type, exactly as many bytes as the shape says."""
    arrays: Arrays = {}
    for message in messages:
        _named(tensor=message.name)
        if message.name in arrays:
            raise InvalidInput(f"tensor {message.name} is there twice")
        shape = tuple(message.shape)
        size = 1
        for length in shape:
            size *= length
        if len(message.data) != 4 * size or len(shape) > 8:
            raise InvalidInput(f"tensor {message.name}: {len(message.data)} bytes are not those of shape {shape}")
        arrays[message.name] = np.frombuffer(message.data, dtype="<f4").reshape(shape).astype(np.float32)
    return arrays


def write_train_request(request: TrainRequest) -> trainer_pb2.TrainRequest:
    """Everything a trainer gets for one round."""
    own = request.plan
    body = {name: getattr(own, name) for name in own.__dataclass_fields__}
    body |= {"event": write_event(own.event), "envelope": write_envelope(own.envelope)}
    return trainer_pb2.TrainRequest(
        plan=trainer_pb2.Plan(**body),
        plan_signature=request.plan_signature,
        reservation=write_signed(request.reservation),
        adapter=write_arrays(request.adapter),
    )


@_strict
def read_train_request(message: trainer_pb2.TrainRequest) -> TrainRequest:
    """The inverse of ``write_train_request``; nothing is believed yet."""
    _present(message, "plan", "reservation")
    own = message.plan
    _present(own, "envelope")
    body = {name: getattr(own, name) for name in Plan.__dataclass_fields__}
    body |= {"event": read_event(own), "envelope": read_envelope(own.envelope)}
    return TrainRequest(
        Plan(**body), message.plan_signature, read_signed(message.reservation), read_arrays(message.adapter)
    )


def write_train_response(answer: Reply | Refusal | Status) -> trainer_pb2.TrainResponse:
    """One of the three things that may leave."""
    if isinstance(answer, Refusal):
        return trainer_pb2.TrainResponse(refusal=write_refusal(answer))
    if isinstance(answer, Status):
        return trainer_pb2.TrainResponse(status=_STATUS_NUMBERS[answer.code])
    update = write_arrays(answer.update)
    reply = trainer_pb2.Reply(update=update, reservation_id=answer.reservation_id, ledger_head=answer.ledger_head)
    return trainer_pb2.TrainResponse(reply=reply)


@_strict
def read_train_response(message: trainer_pb2.TrainResponse) -> Reply | Refusal | Status:
    """The inverse of ``write_train_response``."""
    kind = message.WhichOneof("answer")
    if kind == "reply":
        reply = message.reply
        return Reply(read_arrays(reply.update), reply.reservation_id, reply.ledger_head)
    if kind == "refusal":
        return read_refusal(message.refusal)
    if kind == "status":
        return Status(_known(_STATUSES, message.status, "status"))
    raise InvalidInput("TrainResponse: there is no answer in it")


def write_description(description: Description) -> trainer_pb2.Description:
    """The public facts of a trainer."""
    body = {name: getattr(description, name) for name in description.__dataclass_fields__}
    body["shapes"] = {name: trainer_pb2.Shape(sizes=shape) for name, shape in description.shapes.items()}
    return trainer_pb2.Description(**body)


@_strict
def read_description(message: trainer_pb2.Description) -> Description:
    """The inverse of ``write_description``."""
    body = {name: getattr(message, name) for name in Description.__dataclass_fields__}
    body["shapes"] = {name: tuple(shape.sizes) for name, shape in message.shapes.items()}
    body["trained"] = tuple(message.trained)
    return Description(**body)
