"""``kill -9`` in the middle of a round of real processes: the run ends or resumes, with ε right on both sides.

Every row of docs/operations.md names its test here. A row says who is killed, who brings it back, and how many updates
the round may lose; what is spent is the same whatever happened.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.certificate import verify_certificate
from common.charge import charge

sys.path.insert(0, str(Path(__file__).parents[1] / "deployment"))
from books import accounted, began, charged
from loopback import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROUNDS = 3


@pytest.fixture
def federation(tmp_path):
    """Running, with a run that is in its second round."""
    with tempfile.TemporaryDirectory(prefix="cl-") as sockets:
        made = Loopback(tmp_path, Path(sockets))
        try:
            made.start_coordinator()
            for name in made.names:
                made.start_trainer(name)
            made.wait_listening()
            for name in made.names:
                made.start_node(name)
            made.run = made.submit(rounds=ROUNDS)
            made.wait("round 2 is sent", lambda: f"round 2/{ROUNDS}: sent to" in log(made), 400)
            yield made
        finally:
            made.stop()


def log(federation):
    file = federation.home / "runs" / federation.run / "run.log"
    return file.read_text() if file.exists() else ""


def kill_child(federation, name, program):
    """``kill -9`` of a program that a supervisor keeps running; returns its process id."""
    found = federation.children(name, program)
    assert found, f"no {program} below {name}"
    os.kill(found[0], signal.SIGKILL)
    return found[0]


def resume(federation):
    done = federation.call(
        "coordinator", "runs", "resume", federation.run, "--folder", str(federation.home),
        "--superlink", federation.address,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    time.sleep(2)


def finish(federation, limit_s=600):
    """To the end; a run that says that it can be resumed is resumed, as an operator would, at most twice."""
    for _ in range(3):
        ended = federation.wait_end(federation.run, limit_s)
        if ended["state"] == "finished":
            return ended
        assert ended["exit_code"] == 7, ended
        resume(federation)
    raise AssertionError(ended)


def check_books(federation, lost):
    """Both books hold every reservation that began, and at most ``lost`` more; the certificate says what they say."""
    verdict = verify_certificate(federation.home / "runs" / federation.run / "certificate.json")
    assert verdict.private
    assert verdict.certificate.rounds_run == ROUNDS
    for name in federation.names:
        own = {use.reservation_id: use.event for use in began(federation, name, federation.run)}
        counted = {item.reservation_id: item.event for item in accounted(federation, name, federation.run)}
        assert own.keys() <= counted.keys(), f"{name}: the coordinator's book says less than the organisation's"
        assert len(counted) - len(own) <= lost
        assert len(counted) <= ROUNDS
        truth = charge(list(counted.values()), relation="add_remove", delta=1e-5).epsilon
        assert verdict.epsilons[name].epsilon == pytest.approx(truth, rel=1e-9)
        assert charged(federation, name) >= truth * (1 - 1e-9)


def test_a_killed_trainer_costs_its_round_and_comes_back(federation):
    federation.kill("east-trainer")
    federation.start_trainer("east")
    assert finish(federation)["round"] == ROUNDS
    check_books(federation, lost=0)
    reply_or_lost = [line for line in log(federation).splitlines() if f"round 2/{ROUNDS}: east:" in line]
    assert len(reply_or_lost) == 1
    assert "replied" in reply_or_lost[0] or "lost" in reply_or_lost[0]


def test_a_killed_supernode_is_started_again_and_known_by_its_trainers_key(federation):
    before = kill_child(federation, "east-node", "flower-supernode")
    assert finish(federation)["round"] == ROUNDS
    check_books(federation, lost=1)
    after = federation.children("east-node", "flower-supernode")
    assert after
    assert before not in after
    assert f"round {ROUNDS}/{ROUNDS}: east: replied" in log(federation)


def test_a_killed_superlink_is_started_again_and_the_run_goes_on(federation):
    kill_child(federation, "coordinator", "flower-superlink")
    assert finish(federation)["round"] == ROUNDS
    check_books(federation, lost=1)


def test_a_killed_serverapp_is_resumed_from_its_checkpoint(federation):
    kill_child(federation, "coordinator", "flwr-serverapp")
    shown = federation.call("coordinator", "runs", "show", federation.run, "--folder", str(federation.home))
    assert "interrupted" in shown.stdout
    resume(federation)
    assert finish(federation)["round"] == ROUNDS
    check_books(federation, lost=0)


def test_a_killed_superexec_is_started_again(federation):
    kill_child(federation, "coordinator", "flower-superexec")
    federation.wait(
        "the run ends or is left",
        lambda: federation.state(federation.run)["state"] == "finished" or not federation.children(
            "coordinator", "flwr-serverapp"
        ),
        400,
    )  # fmt: skip
    if federation.state(federation.run)["state"] != "finished":
        resume(federation)
    assert finish(federation)["round"] == ROUNDS
    check_books(federation, lost=1)


def test_a_run_that_is_stopped_ends_with_a_certificate_and_goes_on(federation):
    stopped = federation.call(
        "coordinator", "runs", "stop", federation.run, "--folder", str(federation.home),
        "--superlink", federation.address,
    )  # fmt: skip
    assert stopped.returncode == 0, stopped.stderr
    ended = federation.wait_end(federation.run, 400)
    assert ended["state"] == "stopped"
    certificate = verify_certificate(federation.home / "runs" / federation.run / "certificate.json").certificate
    assert certificate.rounds_run == ended["round"] < ROUNDS
    resume(federation)
    federation.wait("the run has ended", lambda: federation.state(federation.run)["state"] == "finished", 400)
    check_books(federation, lost=0)
