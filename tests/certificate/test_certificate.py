"""A certificate is its exact bytes, and every number in it is recomputed."""

import json
import random
from dataclasses import replace

import pytest

from common.attestation import part_from_json, part_to_json
from common.certificate import (
    Absent,
    Attested,
    Certificate,
    ClientPart,
    Estimate,
    epsilons_of,
    estimate_of,
    issue,
    sign_part,
    statement,
    verify_certificate,
)
from common.errors import InvalidInput, LedgerCorrupt, Refused
from common.messages import Envelope
from common.privacy import PLDAccountant, SampledGaussian
from common.signing import SigningKey, canonical
from common.statement import not_protected

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
COORDINATOR, ACCOUNTANT, CLIENT, OTHER = (SigningKey.generate() for _ in range(4))
HEAD = "a" * 64


def attested(*places, event=EVENT):
    return tuple(Attested(f"{place:032x}", place + 1, place, event) for place in places)


def part(key=CLIENT, name="clinic-a", **changes):
    values = {
        "run_id": "run-1",
        "client": name,
        "dataset": "notes",
        "public_key": key.public_key,
        "relation": "add_remove",
        "delta": 1e-5,
        "target_epsilon": 2.0,
        "declared_records": 1000,
        "clipping_norm": 1.0,
        "envelope": Envelope((EVENT,) * 3),
        "rounds": attested(0, 1),
        "first_head": "0" * 64,
        "last_head": HEAD,
        "code_digest": "c" * 64,
    }
    return ClientPart(**{**values, **changes})


def certificate(*parts, accounted=None, estimate=None, **changes):
    parts = parts or (part(),)
    keys = {CLIENT.public_key: CLIENT, OTHER.public_key: OTHER}
    accounted = accounted or {item.client: item.rounds for item in parts}
    values = {
        "run_id": "run-1",
        "created": "2030-01-01T00:00:00Z",
        "coordinator_key": COORDINATOR.public_key,
        "accountant_key": ACCOUNTANT.public_key,
        "accountant_head": HEAD,
        "accountant_head_signature": ACCOUNTANT.sign("head", {"head": HEAD}),
        "backbone_hash": "b" * 64,
        "initial_adapter_hash": "d" * 64,
        "adapter_hash": "e" * 64,
        "aggregation": "ffa",
        "server_optimizer": "fedadam",
        "noise_schedule": "constant",
        "noise_allocation": "uniform",
        "rounds_planned": 3,
        "rounds_run": 2,
        "simulation": False,
        "private": True,
        "reasons": (),
        "parts": tuple(sign_part(keys[item.public_key], item) for item in parts),
        "accounted": accounted,
        "epsilons": {item.client: epsilons_of(item, accounted[item.client], estimate) for item in parts},
        "not_protected": not_protected(release="immediate", anchored=False, simulation=False),
    }
    return Certificate(**{**values, **changes})


@pytest.fixture(scope="module")
def data():
    return issue(COORDINATOR, certificate())


def forge(good, key=COORDINATOR):
    """What somebody with the coordinator's key could sign, without the checks of ``issue``."""
    body = good.to_json()
    outer = {"format": "cloister certificate", "version": 1, "certificate": body}
    return canonical({**outer, "signature": key.sign("certificate", body)})


def test_a_certificate_verifies_offline_and_every_epsilon_is_recomputed(data, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_bytes(data)
    verdict = verify_certificate(path)
    assert verdict.private
    numbers = verdict.epsilons["clinic-a"]
    assert numbers.epsilon == pytest.approx(PLDAccountant().compose(EVENT, EVENT).epsilon(1e-5), rel=1e-3)
    assert numbers.envelope_epsilon > numbers.epsilon
    assert numbers.epsilon_rdp >= numbers.epsilon
    assert verdict.pinned == ()
    assert verdict.unpinned == ("coordinator", "accountant", "clinic-a")
    assert "not pinned: coordinator" in verdict.statement
    assert Certificate.from_json(verdict.certificate.to_json()) == verdict.certificate


def test_a_certificate_anchors_its_accountants_ledger(data, tmp_path):
    from deploy.commands.ledger import read_anchor

    path = tmp_path / "certificate.json"
    path.write_bytes(data)
    assert read_anchor(str(path)) == HEAD
    path.write_bytes(data.replace(b"clinic-a", b"clinic-b"))
    with pytest.raises(LedgerCorrupt):
        read_anchor(str(path))


def test_pinned_keys_are_told_apart(data):
    verdict = verify_certificate(data, public_key=COORDINATOR.public_key)
    assert verdict.pinned == ("coordinator",)
    keys = [COORDINATOR.public_key, CLIENT.public_key, ACCOUNTANT.public_key]
    assert verify_certificate(data, public_key=keys).unpinned == ()
    for wrong in (OTHER.public_key, CLIENT.public_key, [CLIENT.public_key, OTHER.public_key]):
        with pytest.raises(Refused, match="pinned coordinator"):
            verify_certificate(data, public_key=wrong)


def test_every_changed_byte_is_found(data):
    chooser = random.Random(3)
    for position, byte in enumerate(data):
        other = chooser.choice([value for value in range(256) if value != byte])
        with pytest.raises(LedgerCorrupt):
            verify_certificate(data[:position] + bytes([other]) + data[position + 1 :])


def test_only_the_canonical_bytes_are_a_certificate(data):
    body = json.loads(data)
    for other in (
        data + b"\n",
        b" " + data,
        json.dumps(body).encode(),
        data[:-1],
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        canonical({**body, "more": 1}),
        canonical({**body, "version": 2}),
        canonical({**body, "version": True}),
        canonical({**body, "format": "other"}),
        canonical({**body, "certificate": []}),
        data.replace(b'{"certificate":', b'{"certificate":{},"certificate":', 1),
    ):
        with pytest.raises(LedgerCorrupt):
            verify_certificate(other)
    with pytest.raises(InvalidInput, match="cannot be read"):
        verify_certificate("/nowhere/certificate.json")


LESS_NOISE, MORE_NOISE = SampledGaussian(0.5, 0.01, 100), SampledGaussian(2.0, 0.01, 100)
AGAIN = Attested("x", 2, 1, EVENT)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (lambda: lowered("epsilon"), "its events give"),
        (lambda: lowered("epsilon_rdp"), "its events give"),
        (lambda: lowered("envelope_epsilon"), "its events give"),
        (lambda: lowered("envelope_epsilon_rdp"), "its events give"),
        (lambda: certificate(run_id="run-2"), "another run"),
        (lambda: certificate(private=False), "no reason"),
        (lambda: certificate(reasons=("a seed was fixed",)), "speaks against"),
        (lambda: certificate(accounted={"clinic-a": attested(0)}), "does not list"),
        (lambda: certificate(accounted={"clinic-a": attested(0, 1, event=MORE_NOISE)}), "does not list"),
        (lambda: certificate(accounted={"clinic-a": attested(0, 1, 1)}), "twice"),
        (lambda: certificate(accounted={"clinic-a": (*attested(0, 1), AGAIN)}), "place of the envelope"),
        (lambda: certificate(part(rounds=attested(0, 3))), "outside the envelope"),
        (lambda: certificate(part(rounds=attested(0, event=LESS_NOISE))), "outside the envelope"),
        (lambda: certificate(part(target_epsilon=0.5)), "above its budget"),
        (lambda: certificate(part(declared_records=10, delta=0.2)), "1/declared_records"),
        (lambda: certificate(accounted={"clinic-a": attested(0, 1), "b": ()}), "same clients"),
        (lambda: certificate(part(rounds=attested(0, event=None))), "speaks against"),
        (lambda: unprotected_but_stated(), "its events give"),
        (lambda: certificate(epsilons={}), "no ε is stated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_signed_lie_is_found(forged, message):
    with pytest.raises(LedgerCorrupt, match=message):
        verify_certificate(forge(forged()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "user"}, "nothing is known here of unit 'user'"),
        ({"sampler": "shuffled"}, "'shuffled' sampling"),
        ({"relation": "none"}, "relation 'none'"),
        ({"declared_records": 0}, "declared records"),
        ({"declared_records": "many"}, "declared records"),
        ({"delta": "1e-5"}, "finite numbers"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"target_epsilon": "2"}, "finite numbers"),
        ({"mechanism": 3}, "mechanism must be a text"),
        ({"rounds": (Attested("1", 1, 0.0, EVENT),)}, "whole numbers"),
        ({"rounds": (Attested("1", 1, True, EVENT),)}, "whole numbers"),
        ({"rounds": (Attested(1, 1, 0, EVENT),)}, "reservation must be a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_whose_epsilon_would_mean_something_else_is_refused_by_everybody_who_reads_it(changes, message):
    """Its signature is right: the lie, or the fault, is in what was signed."""
    false = part(**changes)
    with pytest.raises(LedgerCorrupt, match=message):
        verify_certificate(forge(replace(certificate(), parts=(sign_part(CLIENT, false),))))
    with pytest.raises(InvalidInput, match=message):
        part_from_json(part_to_json(sign_part(CLIENT, false)))


@pytest.mark.parametrize(
    "changes",
    [
        {"reasons": (1, 2), "private": False},
        {"accountant_head_signature": 7},
        {"coordinator_key": 7},
        {"epsilon": "0.1"},
        {"estimate": Estimate("x", None, 3)},
    ],
    ids=str,
)
def test_words_of_another_type_are_a_certificate_that_does_not_verify(changes):
    """And no fault of whoever verifies: a dashboard that ends over one certificate shows none."""
    good = certificate()
    if set(changes) <= {"epsilon", "estimate"}:
        changes = {"epsilons": {"clinic-a": replace(good.epsilons["clinic-a"], **changes)}}
    with pytest.raises(LedgerCorrupt):
        verify_certificate(forge(replace(good, **changes)))


def lowered(name):
    good = certificate()
    numbers = good.epsilons["clinic-a"]
    return replace(good, epsilons={"clinic-a": replace(numbers, **{name: getattr(numbers, name) * 0.999})})


def estimated(part_given=None, **changes):
    """A certificate with the true estimate beside its numbers, or with one that was changed."""
    given = part_given or part()
    events = [item.event for item in given.rounds if item.event is not None]
    true = estimate_of(events or [EVENT], relation="add_remove", delta=given.delta)
    return certificate(given, estimate=replace(true, **changes))


def test_the_true_estimate_stands_and_may_be_left_out():
    assert verify_certificate(issue(COORDINATOR, estimated())).epsilons["clinic-a"].estimate.epsilon > 0
    assert verify_certificate(issue(COORDINATOR, certificate())).epsilons["clinic-a"].estimate is None


@pytest.mark.parametrize(
    "forged",
    [
        lambda: estimated(epsilon=0.1),
        lambda: estimated(epsilon=1e3),
        lambda: estimated(skewness=0.0),
        lambda: estimated(in_regime=True),
        lambda: estimated(in_regime=0),
        lambda: estimated(part(relation="replace_one")),
        lambda: estimated(part(rounds=())),
    ],
)
def test_a_wrong_estimate_is_found(forged):
    """It is no bound, but a reader who is shown it beside the bound believes that it was computed."""
    with pytest.raises(LedgerCorrupt, match="Edgeworth"):
        verify_certificate(forge(forged()))


def test_where_the_formula_has_no_form_there_is_no_estimate():
    assert estimate_of([SampledGaussian(0.05, 0.01, 1)], relation="add_remove", delta=1e-5) is None
    assert estimate_of([], relation="add_remove", delta=1e-5) is None


def unprotected_but_stated():
    spoiled = certificate(part(rounds=attested(0, event=None)))
    return replace(spoiled, epsilons=certificate().epsilons)


def test_signatures_of_others_are_found(data):
    good = certificate()
    with pytest.raises(LedgerCorrupt, match="does not match key"):
        verify_certificate(forge(good, key=OTHER))
    stolen = replace(good.parts[0], part=replace(good.parts[0].part, clipping_norm=2.0))
    with pytest.raises(LedgerCorrupt, match="certificate-part"):
        verify_certificate(forge(replace(good, parts=(stolen,))))
    with pytest.raises(LedgerCorrupt, match="head"):
        verify_certificate(forge(replace(good, accountant_head="f" * 64)))
    with pytest.raises(InvalidInput, match="another coordinator key"):
        issue(OTHER, good)
    with pytest.raises(InvalidInput, match="another public key"):
        sign_part(OTHER, part())
    with pytest.raises(InvalidInput, match="would not verify"):
        issue(COORDINATOR, lowered("epsilon"))


def test_what_the_coordinator_reserved_and_never_delivered_counts():
    good = certificate(accounted={"clinic-a": attested(0, 1, 2)})
    verdict = verify_certificate(issue(COORDINATOR, good))
    assert verdict.epsilons["clinic-a"].epsilon == verdict.epsilons["clinic-a"].envelope_epsilon


def test_a_certificate_that_says_not_private_is_consistent():
    plain = part(rounds=attested(0, event=None), target_epsilon=None, envelope=Envelope(()))
    verdict = verify_certificate(
        issue(COORDINATOR, certificate(plain, private=False, reasons=("the run was made without noise",)))
    )
    assert not verdict.private
    assert verdict.epsilons["clinic-a"].epsilon is None
    assert "NOT PRIVATE: the run was made without noise" in verdict.statement
    assert "no guarantee" in verdict.statement
    seeded = certificate(private=False, reasons=("--seed fixed the noise",))
    verdict = verify_certificate(issue(COORDINATOR, seeded))
    assert not verdict.private
    assert "no guarantee; accounted" in verdict.statement


def test_the_statement_says_what_every_number_means():
    good = certificate(
        part(), part(OTHER, "clinic-b", relation="replace_one"), estimate=Estimate(1.0, 0.5, False), notes=("42 rows",)
    )
    text = statement(good)
    for words in (
        "clinic-a (notes): ε ≤ ",
        "δ = 1e-05",
        "unit record",
        "relation add_remove",
        "relation replace_one",
        "differ in that (clinic-a) one record is added or removed, or (clinic-b) one record is replaced by any other",
        "poisson sampling",
        "Edgeworth estimate 1, no guarantee, outside its regime",
        "Not protected:",
        "timing",
        "cost the largest of these ε",
        "Not learned: that the noise was really added",
        "42 rows",
    ):
        assert words in text
    assert "pinned" not in text


def test_an_organisation_of_which_nothing_began_is_said_to_attest_that():
    """A coordinator can ask for a part of any run, and is given one that says so."""
    text = verify_certificate(issue(COORDINATOR, certificate(part(rounds=()), part(OTHER, "clinic-b")))).statement
    (idle, other) = (line for line in text.splitlines() if line.startswith("- clinic"))
    assert "it attests that nothing began there" in idle
    assert "nothing began" not in other


@pytest.mark.parametrize(
    ("options", "words"),
    [({"simulation": True}, "one process"), ({"anchored": True}, ""), ({"release": "slot"}, "")],
)
def test_what_is_not_protected_follows_from_the_set_up(options, words):
    base = {"release": "immediate", "anchored": False, "simulation": False}
    items = not_protected(**{**base, **options})
    assert words in " ".join(items)
    assert any("timing" in item for item in items) == (options.get("release") != "slot")
    assert any("set back" in item for item in items) == (not options.get("anchored", False))


def nothing_signed(name="clinic-b", **changes):
    values = {"rounds": (), "first_head": "", "last_head": "", "code_digest": ""}
    return part(OTHER, name, **{**values, **changes})


def without_clinic_b(accounted=None, absent=None, **changes):
    """clinic-a has signed; clinic-b took part in rounds 1 and 2 and is gone."""
    absent = absent or Absent(nothing_signed(), "unreachable")
    accounted = accounted or {"clinic-a": attested(0, 1), "clinic-b": attested(0, 1)}
    every = [part(), absent.part]
    epsilons = {one.client: epsilons_of(one, accounted[one.client]) for one in every if one.client in accounted}
    return certificate(part(), accounted=accounted, epsilons=epsilons, absent=(absent,), **changes)


def test_an_absent_organisation_is_named_and_its_epsilon_is_the_coordinators_word_alone():
    verdict = verify_certificate(issue(COORDINATOR, without_clinic_b()))
    assert verdict.private
    assert verdict.epsilons["clinic-b"].epsilon == pytest.approx(verdict.epsilons["clinic-a"].epsilon)
    assert Certificate.from_json(verdict.certificate.to_json()) == verdict.certificate
    assert "clinic-b" not in verdict.pinned + verdict.unpinned  # it signed nothing that a key could vouch for
    first, *lines = verdict.statement.splitlines()
    assert "is differentially private for the records of clinic-a" in first
    assert "NOT ATTESTED by clinic-b" in first
    (own,) = [line for line in lines if line.startswith("- clinic-b")]
    assert "NOT ATTESTED: it was not connected when the run ended" in own
    assert "if it trained as the coordinator's accountant reserved" in own


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (lambda: replace(without_clinic_b(), parts=()), "signed anything"),
        (lambda: replace(without_clinic_b(), absent=()), "same clients"),
        (lambda: without_clinic_b(absent=Absent(nothing_signed("clinic-a"), "silent")), "same clients"),
        (lambda: without_clinic_b({"clinic-a": attested(0, 1), "clinic-b": attested(0, 3)}), "outside the envelope"),
        (lambda: without_clinic_b(absent=Absent(nothing_signed(run_id="run-2"), "silent")), "another run"),
        (lambda: without_clinic_b(absent=Absent(nothing_signed(target_epsilon=0.5), "silent")), "above its budget"),
        (lambda: without_clinic_b({"clinic-a": attested(0, 1), "clinic-b": attested(0, event=None)}), "speaks against"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lie_about_an_absent_organisation_is_found(forged, message):
    with pytest.raises(LedgerCorrupt, match=message):
        verify_certificate(forge(forged()))


def test_nothing_is_attested_for_who_signed_nothing_and_the_reason_is_one_of_three():
    with pytest.raises(ValueError, match="nothing can be attested"):
        Absent(part(OTHER, "clinic-b"), "silent")
    with pytest.raises(ValueError, match="no reason"):
        Absent(nothing_signed(), "they would not tell")
    body = without_clinic_b().to_json()
    body["absent"][0]["reason"] = "they would not tell"
    outer = {"format": "cloister certificate", "version": 1, "certificate": body}
    with pytest.raises(LedgerCorrupt, match="malformed"):
        verify_certificate(canonical({**outer, "signature": COORDINATOR.sign("certificate", body)}))
