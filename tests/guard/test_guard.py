"""The guard of an honest federation: what it admits, remembers and repeats."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.admission import Granted, Lost, Refused, Replay
from client.guard import Guard
from client.journal import Replies, State, Use
from client.policy import DatasetPolicy
from common import errors
from common.charge import charge
from common.errors import LedgerCorrupt, Unavailable
from common.ledger import Ledger
from common.messages import RefusalReason
from common.signing import SigningKey, verify

ROOT = Path(__file__).parents[2]
SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}


def update(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def same(one, two):
    return set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


def envelope_epsilon(request, delta=1e-5):
    return charge(request.plan.envelope.events, relation="add_remove", delta=delta).epsilon


def test_a_good_request_is_granted_trained_and_answered(parties, guard):
    request = parties.request()
    assert guard.admit(request, shapes=SHAPES) == Granted(request)
    guard.start(request)
    reply = guard.finish(request, update(2.0))
    assert same(reply.update, update(2.0))
    assert reply.reservation_id == request.reservation.reservation.reservation_id
    assert reply.ledger_head == guard.head(parties.coordinator.public_key)


def test_the_whole_envelope_is_charged_before_the_first_round_and_once(parties, guard):
    first = parties.request()
    guard.admit(first, shapes=SHAPES)
    cost = envelope_epsilon(first)
    assert guard.spent("notes").epsilon == pytest.approx(cost)
    parties.train(guard, first)
    parties.train(guard, parties.request(server_round=2, participation=1))
    spent = guard.spent("notes")
    assert (spent.epsilon, spent.delta) == (pytest.approx(cost), 1e-5)
    assert spent.left == pytest.approx(2.0 - cost)


@pytest.mark.parametrize("restarted", [False, True])
def test_the_same_request_gets_the_same_bytes(parties, guard, restarted):
    request = parties.request()
    reply = parties.train(guard, request, 3.0)
    parties.train(guard, parties.request(server_round=2, participation=1))
    guard = parties.restart() if restarted else guard
    admission = guard.admit(request, shapes=SHAPES)
    assert isinstance(admission, Replay)
    assert same(admission.reply.update, reply.update)
    assert (admission.reply.reservation_id, admission.reply.ledger_head) == (reply.reservation_id, reply.ledger_head)
    with pytest.raises(errors.Refused):
        guard.start(request)


def test_what_began_before_a_restart_is_lost_and_never_trained_again(parties, guard):
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    guard.start(request)
    guard = parties.restart()
    assert guard.admit(request, shapes=SHAPES) == Lost()
    with pytest.raises(errors.Refused):
        guard.start(request)
    with pytest.raises(errors.Refused):
        guard.finish(request, update(1.0))
    assert isinstance(guard.admit(parties.request(attempt=2), shapes=SHAPES), Refused)  # its place began
    assert isinstance(guard.admit(parties.request(attempt=2, participation=1), shapes=SHAPES), Granted)


def test_what_was_only_admitted_before_a_restart_may_still_be_trained(parties, guard):
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    guard = parties.restart()
    assert isinstance(guard.admit(request, shapes=SHAPES), Granted)
    guard.start(request)


def test_an_abandoned_training_is_lost(parties, guard):
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    guard.start(request)
    guard.abandon(request)
    assert guard.admit(request, shapes=SHAPES) == Lost()
    parties.train(guard, parties.request(server_round=2, participation=1))


def test_one_training_at_a_time_and_busy_never_gives_back(parties, guard):
    first, second = parties.request(), parties.request(server_round=2, participation=1)
    guard.admit(first, shapes=SHAPES)
    guard.start(first)
    for request in (first, second):
        refused = guard.admit(request, shapes=SHAPES)
        assert refused.refusal.reason is RefusalReason.BUSY
        assert not refused.refusal.voiding
    guard.finish(first, update(1.0))
    assert isinstance(guard.admit(second, shapes=SHAPES), Granted)


def test_two_admitted_requests_cannot_take_one_place(parties, guard):
    first, second = parties.request(), parties.request(attempt=2)
    guard.admit(first, shapes=SHAPES)
    guard.admit(second, shapes=SHAPES)
    guard.start(first)
    guard.finish(first, update(1.0))
    with pytest.raises(errors.Refused, match="place"):
        guard.start(second)


def test_a_reply_that_was_damaged_on_disk_is_lost(parties, guard):
    request = parties.request()
    parties.train(guard, request)
    (stored,) = (parties.folder / "own.sqlite.replies").iterdir()
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(bytes(data))
    assert guard.admit(request, shapes=SHAPES) == Lost()
    stored.write_bytes(b"")
    assert guard.admit(request, shapes=SHAPES) == Lost()


def test_a_reply_that_cannot_be_stored_is_lost(parties, guard):
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    guard.start(request)
    folder = parties.folder / "own.sqlite.replies"
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(Unavailable):
        guard.finish(request, update(1.0))
    assert guard.admit(request, shapes=SHAPES) == Lost()


def test_only_the_newest_replies_are_kept(tmp_path):
    replies = Replies(tmp_path / "replies", keep=2)
    uses = [Use("coordinator", f"id-{number}", "hash", State.STARTED) for number in range(4)]
    for number, use in enumerate(uses):
        use.update_hash = replies.store(use, update(number))
        os.utime(replies._path(use), ns=(number, number))
    assert [replies.load(use) is None for use in uses] == [True, True, False, False]


def test_one_starts_at_a_time(parties, guard):
    first, second = parties.request(), parties.request(server_round=2, participation=1)
    guard.admit(first, shapes=SHAPES)
    guard.admit(second, shapes=SHAPES)
    guard.start(first)
    with pytest.raises(errors.Refused, match="another request"):
        guard.start(second)


def test_another_request_under_an_admitted_reservation_is_refused(parties, guard, change):
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    other = change(request, parties, learning_rate=0.5)
    refusal = guard.admit(other, shapes=SHAPES).refusal
    assert (refusal.reason, refusal.voiding) == (RefusalReason.USED, False)
    with pytest.raises(errors.Refused):
        guard.start(other)


def test_heads_are_signed(parties, guard):
    guard.admit(parties.request(), shapes=SHAPES)
    head, signature = guard.signed_head(parties.coordinator.public_key)
    verify(guard.public_key, "head", {"head": head}, signature)
    assert [use.state for use in guard.uses(parties.coordinator.public_key, "run")] == [State.RESERVED]


def test_lines_that_no_guard_wrote_stop_it(parties):
    with Ledger(parties.folder / "own.sqlite") as ledger:
        ledger.append("replied", parties.coordinator.public_key, {"reservation_id": "unknown"})
    with pytest.raises(LedgerCorrupt, match="makes no sense"):
        parties.guard()


def test_a_second_guard_on_the_same_ledger_refuses_to_start(parties, guard):
    with pytest.raises(errors.Refused, match="another trainer"):
        parties.guard()
    code = (
        "import fcntl, sys\n"
        "try:\n    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except OSError:\n    sys.exit(5)"
    )
    lock = parties.folder / "own.sqlite.lock"
    assert subprocess.run([sys.executable, "-c", code, lock], cwd=ROOT, check=False).returncode == 5
    guard.close()
    assert subprocess.run([sys.executable, "-c", code, lock], cwd=ROOT, check=False).returncode == 0


def test_a_guard_does_not_start_on_a_changed_ledger(parties, guard):
    parties.train(guard, parties.request())
    guard.close()
    with Ledger(parties.folder / "own.sqlite") as ledger, ledger.exclusive() as connection:
        connection.exec_driver_sql("DROP TRIGGER ledger_entries_no_update")
        connection.exec_driver_sql("UPDATE ledger_entries SET body = replace(body, 'notes', 'labs!')")
    with pytest.raises(LedgerCorrupt):
        parties.guard()


def test_a_ledger_that_was_set_back_is_found_by_its_anchor(parties):
    anchor = parties.folder / "elsewhere" / "head"
    anchor.parent.mkdir()
    guard = parties.guard(anchor=anchor)
    parties.train(guard, parties.request())
    guard.close()
    old = (parties.folder / "own.sqlite").read_bytes()
    guard = parties.guard(anchor=anchor)
    parties.train(guard, parties.request(server_round=2, participation=1))
    guard.close()
    assert anchor.read_text().strip() == last_head(parties)
    (parties.folder / "own.sqlite").write_bytes(old)
    with pytest.raises(LedgerCorrupt, match="anchored head"):
        parties.guard(anchor=anchor)
    anchor.unlink()
    with pytest.raises(LedgerCorrupt, match="missing"):
        parties.guard(anchor=anchor)


KEEPER = """
import sys, pathlib
kept = pathlib.Path(sys.argv[1])
if sys.argv[2] == "get":
    print(kept.read_text() if kept.exists() else "")
else:
    kept.write_text(sys.argv[3])
"""


def test_a_command_can_be_the_anchor(parties, tmp_path):
    program, kept = tmp_path / "keeper.py", tmp_path / "kept"
    program.write_text(KEEPER)
    command = (sys.executable, str(program), str(kept))
    guard = parties.guard(anchor_command=command)
    parties.train(guard, parties.request())
    guard.close()
    assert kept.read_text() == last_head(parties)
    parties.guard(anchor_command=command).close()
    kept.write_text("f" * 64)
    with pytest.raises(LedgerCorrupt, match="anchored head"):
        parties.guard(anchor_command=command)
    kept.write_text("nonsense")
    with pytest.raises(LedgerCorrupt, match="no head"):
        parties.guard(anchor_command=command)
    with pytest.raises(Unavailable, match="failed"):
        parties.guard(anchor_command=("/nowhere/keeper",))
    with pytest.raises(ValueError, match="not both"):
        parties.policy(anchor_command=command, anchor=kept)


def last_head(parties):
    with Ledger(parties.folder / "own.sqlite", read_only=True) as ledger:
        return ledger.head()


def test_nothing_is_given_while_the_anchor_cannot_be_written(parties):
    anchor = parties.folder / "elsewhere" / "head"
    anchor.parent.mkdir()
    guard = parties.guard(anchor=anchor)
    request = parties.request()
    guard.admit(request, shapes=SHAPES)
    guard.start(request)
    anchor.unlink()
    anchor.parent.rmdir()
    with pytest.raises(Unavailable, match="anchor"):
        guard.finish(request, update(1.0))
    with pytest.raises(Unavailable, match="anchor"):
        guard.admit(request, shapes=SHAPES)
    anchor.parent.mkdir()
    assert isinstance(guard.admit(request, shapes=SHAPES), Replay)


def test_a_coordinators_chain_says_nothing_of_the_others(parties):
    other = SigningKey.generate()
    guard = parties.guard(coordinator_keys=(parties.coordinator.public_key, other.public_key))
    parties.train(guard, parties.request())
    head = guard.head(parties.coordinator.public_key)
    first, parties.coordinator = parties.coordinator, other
    assert isinstance(guard.admit(parties.request(run_id="second"), shapes=SHAPES), Refused)  # δ is spent
    assert guard.head(first.public_key) == head
    assert guard.head(other.public_key) != head


def test_budgets_belong_to_data_sets_across_runs_and_coordinators(parties):
    cost = envelope_epsilon(parties.request(), 1e-6)
    other = SigningKey.generate()
    notes = DatasetPolicy(
        declared_records=1000, target_epsilon=2.5 * cost, run_epsilon=1.1 * cost, target_delta=9e-6, run_delta=1e-6
    )
    guard = parties.guard(
        datasets={"notes": notes}, coordinator_keys=(parties.coordinator.public_key, other.public_key)
    )
    assert isinstance(guard.admit(parties.request(run_id="one"), shapes=SHAPES), Granted)
    parties.coordinator = other
    granted = []
    for run_id in ("one", "two", "three", "four"):
        admission = guard.admit(parties.request(run_id=run_id), shapes=SHAPES)
        granted.append(isinstance(admission, Granted))
        if not granted[-1]:
            assert admission.refusal.reason is RefusalReason.BUDGET
            assert admission.refusal.voiding
    assert granted == [True, False, False, False]
    assert guard.spent("notes").epsilon <= 2.5 * cost


def test_data_sets_of_one_group_share_one_budget(parties):
    cost = envelope_epsilon(parties.request(), 1e-6)
    shared = DatasetPolicy(declared_records=1000, target_epsilon=1.5 * cost, group="patients", run_delta=1e-6)
    guard = parties.guard(datasets={"notes": shared, "labs": shared})
    assert isinstance(guard.admit(parties.request(), shapes=SHAPES), Granted)
    refused = guard.admit(parties.request(run_id="second", dataset="labs"), shapes=SHAPES)
    assert refused.refusal.reason is RefusalReason.BUDGET


def test_a_run_without_privacy_needs_the_policys_word_and_is_infinite(parties, guard):
    request = parties.request(event=None)
    assert guard.admit(request, shapes=SHAPES).refusal.reason is RefusalReason.POLICY
    public = DatasetPolicy(declared_records=1000, target_epsilon=2.0, without_privacy=True)
    guard = parties.restart(datasets={"notes": public})
    assert isinstance(guard.admit(parties.request(event=None), shapes=SHAPES), Granted)
    assert guard.spent("notes").epsilon == float("inf")
    private = guard.admit(parties.request(participation=1), shapes=SHAPES)
    assert private.refusal.reason is RefusalReason.ENVELOPE


def test_the_guard_type_is_a_context(parties):
    with Guard(parties.policy(), parties.folder / "own.sqlite", key=parties.client) as guard:
        assert guard.spent("notes").epsilon == 0
    parties.guard()


def test_the_part_of_the_certificate_lists_what_began_and_is_signed(parties, guard):
    coordinator = parties.coordinator.public_key
    guard.admit(parties.request(run_id="before", dataset="unknown"), shapes=SHAPES)
    first_head = guard.head(coordinator)
    with pytest.raises(errors.Refused, match="never charged"):
        guard.part(coordinator, "run", "notes", code_digest="c" * 64)
    first, second = parties.request(), parties.request(server_round=2, participation=1)
    parties.train(guard, first)
    guard.admit(second, shapes=SHAPES)
    guard.start(second)
    guard = parties.restart()
    guard.admit(parties.request(server_round=3, participation=2), shapes=SHAPES)  # admitted, and never began
    signed = guard.part(coordinator, "run", "notes", code_digest="c" * 64)
    part = signed.part
    verify(guard.public_key, "certificate-part", part.to_json(), signed.signature)
    assert [(item.server_round, item.participation) for item in part.rounds] == [(1, 0), (2, 1)]
    assert part.private
    assert part.envelope == first.plan.envelope
    assert (part.first_head, part.last_head) == (first_head, guard.head(coordinator))
    assert (part.delta, part.relation, part.target_epsilon, part.clipping_norm) == (1e-5, "add_remove", 2.0, 1.0)
