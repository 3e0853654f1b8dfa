"""A signed part that contradicts the coordinator's book is shown beside it, and neither side gains a smaller ε."""

import json
import re
from dataclasses import replace

import pytest

from common.certificate import (
    Absent,
    Attested,
    Certificate,
    ClientPart,
    Estimate,
    epsilons_of,
    epsilons_of_absent,
    issue,
    sign_part,
    verify_certificate,
)
from common.charge import charge
from common.contradiction import contradictions
from common.errors import LedgerCorrupt
from common.messages import Envelope
from common.privacy import SampledGaussian
from common.signing import SigningKey, canonical
from common.statement import not_protected
from deploy.commands.ledger import verdict_json

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
LESS, MORE = SampledGaussian(0.7, 0.01, 100), SampledGaussian(2.0, 0.01, 100)
COORDINATOR, ACCOUNTANT, GOOD, BAD, STRANGER = (SigningKey.generate() for _ in range(5))
HEAD = "a" * 64


def attested(*places, event=EVENT, prefix=0):
    return tuple(Attested(f"{prefix + place:032x}", place + 1, place, event) for place in places)


def part(key, name, **changes):
    values = {
        "run_id": "run-1", "client": name, "dataset": "notes", "public_key": key.public_key,
        "relation": "add_remove", "delta": 1e-5, "target_epsilon": 4.0, "declared_records": 1000,
        "clipping_norm": 1.0, "envelope": Envelope((EVENT,) * 3), "rounds": attested(0, 1),
        "first_head": "0" * 64, "last_head": HEAD, "code_digest": "c" * 64,
    }  # fmt: skip
    return ClientPart(**{**values, **changes})


def book(**changes):
    """What the coordinator says of the organisation called bad."""
    return part(BAD, "bad", **{"rounds": (), "first_head": "", "last_head": "", "code_digest": "", **changes})


def contradicted(signed, *, accounted=None, own=None, epsilons=None, key=BAD, **changes):
    """good's part stands; ``signed`` is what bad signed beside what the coordinator lists for it."""
    one = Absent(own or book(), "contradicting", sign_part(key, signed))
    good = part(GOOD, "good")
    listed = {"good": good.rounds, "bad": attested(0, 1) if accounted is None else accounted}
    found = {"good": epsilons_of(good, listed["good"]), "bad": epsilons or epsilons_of_absent(one, listed["bad"])}
    values = {
        "run_id": "run-1", "created": "2030-01-01T00:00:00Z", "coordinator_key": COORDINATOR.public_key,
        "accountant_key": ACCOUNTANT.public_key, "accountant_head": HEAD,
        "accountant_head_signature": ACCOUNTANT.sign("head", {"head": HEAD}), "backbone_hash": "b" * 64,
        "initial_adapter_hash": "d" * 64, "adapter_hash": "e" * 64, "aggregation": "ffa", "server_optimizer": "fedadam",
        "noise_schedule": "constant", "noise_allocation": "uniform", "rounds_planned": 3, "rounds_run": 2,
        "simulation": False, "private": True, "reasons": (), "parts": (sign_part(GOOD, good),), "accounted": listed,
        "epsilons": found, "absent": (one,),
        "not_protected": not_protected(release="immediate", anchored=False, simulation=False),
    }  # fmt: skip
    return Certificate(**{**values, **changes})


def forge(good):
    body = good.to_json()
    outer = {"format": "cloister certificate", "version": 1, "certificate": body}
    return canonical({**outer, "signature": COORDINATOR.sign("certificate", body)})


def epsilon_of(*events, delta=1e-5):
    return charge(events, relation="add_remove", delta=delta).epsilon


FIGURES = {
    "a round that the book lacks": (
        lambda: part(BAD, "bad", rounds=attested(0, 1, 2)),
        "which the accountant does not list",
        lambda: (epsilon_of(*[EVENT] * 3), epsilon_of(*[EVENT] * 3)),
    ),
    "less noise than the book has": (
        lambda: part(BAD, "bad", rounds=attested(0, 1, event=LESS), envelope=Envelope((LESS,) * 3)),
        r"\(σ = 0.7, q = 0.01, 100 steps\), which the accountant does not list so, but as round 1",
        lambda: (epsilon_of(EVENT, EVENT, LESS, LESS), epsilon_of(*[LESS] * 3)),
    ),
    "more noise than the book has": (
        lambda: part(BAD, "bad", rounds=attested(0, 1, event=MORE), envelope=Envelope((MORE,) * 3)),
        "outside the envelope that it signed",
        lambda: (epsilon_of(EVENT, EVENT, MORE, MORE), epsilon_of(*[EVENT] * 3)),
    ),
    "another round": (
        lambda: part(BAD, "bad", rounds=(replace(attested(0)[0], server_round=3),)),
        "as round 3 at place 0",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),
    ),
    "one reservation twice": (
        lambda: part(BAD, "bad", rounds=attested(0, 0)),
        "twice",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),
    ),
    "a larger envelope": (
        lambda: part(BAD, "bad", envelope=Envelope((EVENT, EVENT, LESS))),
        "place 2 of its envelope is σ = 0.7",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(EVENT, EVENT, LESS)),
    ),
    "a shorter envelope": (
        lambda: part(BAD, "bad", envelope=Envelope((EVENT,) * 2)),
        "its envelope has 2 places, the coordinator's book 3",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),
    ),
    "another data set": (
        lambda: part(BAD, "bad", dataset="labs"),
        "of data set labs, the coordinator's book of notes",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),
    ),
    "an envelope above its own budget": (
        lambda: part(BAD, "bad", target_epsilon=0.5),
        "above its budget 0.5",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),
    ),
    "a smaller δ": (
        lambda: part(BAD, "bad", delta=1e-7, rounds=attested(0, 1, 2)),
        "does not list",
        lambda: (epsilon_of(*[EVENT] * 3, delta=1e-7), epsilon_of(*[EVENT] * 3, delta=1e-7)),
    ),
    "without privacy": (
        lambda: part(BAD, "bad", rounds=attested(0, 1, event=None)),
        "without privacy",
        lambda: (None, None),
    ),
    "of a run without privacy": (
        lambda: part(BAD, "bad", rounds=(), target_epsilon=None, envelope=Envelope(())),
        "of a run without privacy, the coordinator's book of one with it",
        lambda: (None, None),
    ),
    "another relation": (
        lambda: part(BAD, "bad", rounds=attested(0, 1, 2), relation="zero_out"),
        "does not list",
        lambda: (None, None),
    ),
    "a δ that its declared size forbids": (
        lambda: part(BAD, "bad", declared_records=10, delta=0.2),
        "1/declared_records",
        lambda: (epsilon_of(EVENT, EVENT), epsilon_of(*[EVENT] * 3)),  # at the coordinator's δ, which is smaller
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIGURES, ids=str)
def test_both_words_are_shown_and_no_smaller_epsilon_is_stated_than_both_support(case):
    """Each of these once kept every other organisation from its certificate."""
    make, words, expected = FIGURES[case]
    signed = make()
    data = issue(COORDINATOR, contradicted(signed))
    verdict = verify_certificate(data)
    assert verdict.private  # it speaks of the others
    assert Certificate.from_json(verdict.certificate.to_json()) == verdict.certificate
    (one,) = verdict.certificate.absent
    assert (one.reason, one.signed.part) == ("contradicting", signed)
    assert contradictions(signed, attested(0, 1), one.part) == verdict.contradictions["bad"]
    numbers, (rounds, whole) = verdict.epsilons["bad"], expected()
    assert numbers.epsilon == (None if rounds is None else pytest.approx(rounds))
    assert numbers.envelope_epsilon == (None if whole is None else pytest.approx(max(rounds, whole)))
    assert verdict.epsilons["good"] == epsilons_of(part(GOOD, "good"), attested(0, 1))
    first, *lines = verdict.statement.splitlines()
    assert "differentially private for the records of good. CONTRADICTED by bad" in first
    (line,) = [line for line in lines if line.startswith("- bad")]
    assert re.search(words, line)
    assert "Its signed part: " in line
    assert "The coordinator's book: 2 rounds in an envelope of 3" in line
    assert ("No guarantee" in line) == (rounds is None)
    assert verdict_json(verdict)["contradictions"] == {"bad": list(verdict.contradictions["bad"])}
    assert verdict_json(verdict)["absent"] == {"bad": "contradicting"}
    json.dumps(verdict_json(verdict))


def test_the_key_that_signed_a_contradiction_can_be_pinned():
    verdict = verify_certificate(issue(COORDINATOR, contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)))))
    assert "bad" in verdict.unpinned
    data = issue(COORDINATOR, contradicted(part(BAD, "bad", rounds=attested(0, 1, 2))))
    assert "bad" in verify_certificate(data, public_key=[COORDINATOR.public_key, BAD.public_key]).pinned


def test_a_place_that_a_client_made_count_twice_costs_more_than_the_envelope_and_blocks_nobody():
    """It gives a reservation back, its place is given anew, then it says that it trained under the first too."""
    doubled = (*attested(0, 1, 2), *attested(0, 1, 2, prefix=100))
    data = issue(COORDINATOR, contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)), accounted=doubled))
    numbers = verify_certificate(data).epsilons["bad"]
    assert numbers.envelope_epsilon == numbers.epsilon == pytest.approx(epsilon_of(*[EVENT] * 6))
    silent = Absent(book(), "silent")
    without = contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)), accounted=doubled)
    without = replace(
        without, absent=(silent,), epsilons={**without.epsilons, "bad": epsilons_of_absent(silent, doubled)}
    )
    numbers = verify_certificate(issue(COORDINATOR, without)).epsilons["bad"]
    assert numbers.envelope_epsilon == pytest.approx(epsilon_of(*[EVENT] * 6))


def lied(**changes):
    true = contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)))
    return replace(true, epsilons={**true.epsilons, "bad": replace(true.epsilons["bad"], **changes)})


LONG = part(BAD, "bad", rounds=attested(0, 1, 2), envelope=Envelope((EVENT,) * 4))


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (lambda: contradicted(part(BAD, "bad")), "said to contradict the book, and does not"),
        (lambda: contradicted(part(BAD, "bad", rounds=())), "and does not"),  # what never arrived contradicts nothing
        (lambda: lied(epsilon=epsilon_of(EVENT, EVENT)), "its events give"),
        (lambda: lied(envelope_epsilon=1e-3), "its events give"),
        (lambda: lied(epsilon_rdp=1e-3), "its events give"),
        (lambda: lied(estimate=Estimate(1.0, 0.1, True)), "no Edgeworth estimate"),
        (lambda: contradicted(part(BAD, "worse", rounds=attested(0, 1, 2))), "another's"),
        (lambda: contradicted(part(BAD, "bad", run_id="run-2", rounds=attested(0, 1, 2))), "another run"),
        (lambda: contradicted(part(STRANGER, "bad", rounds=attested(0, 1, 2)), key=STRANGER), "another's"),
        (lambda: contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)), accounted=attested(0, 3)), "outside"),
        (lambda: contradicted(LONG), "more rounds than the run has"),
        (lambda: replace(contradicted(LONG, rounds_planned=4), parts=()), "signed anything"),
    ],
)  # fmt: skip
def test_a_coordinator_cannot_lie_with_a_contradiction(forged, message):
    """Nor make one out of a part that stands, nor shrink an ε by it, nor use another's signature."""
    with pytest.raises(LedgerCorrupt, match=message):
        verify_certificate(forge(forged()))


def test_a_contradiction_without_its_signature_is_none():
    true = contradicted(part(BAD, "bad", rounds=attested(0, 1, 2)))
    (one,) = true.absent
    moved = replace(one, signed=replace(one.signed, part=replace(one.signed.part, clipping_norm=2.0)))
    with pytest.raises(LedgerCorrupt, match="certificate-part"):
        verify_certificate(forge(replace(true, absent=(moved,))))
    with pytest.raises(ValueError, match="shown with the part"):
        Absent(book(), "contradicting")
    with pytest.raises(ValueError, match="shown with the part"):
        Absent(book(), "silent", sign_part(BAD, part(BAD, "bad")))


def test_many_contradictions_are_counted():
    signed = part(BAD, "bad", rounds=tuple(Attested(f"{n:032x}", 1, 0, MORE) for n in range(50, 60)))
    true = contradicted(signed, rounds_planned=10)
    statement = verify_certificate(issue(COORDINATOR, true)).statement
    assert "; and 5 more" in statement
