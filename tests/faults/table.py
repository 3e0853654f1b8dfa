"""What the rows of the table in docs/operations.md share: a run in its second round, and what must hold at its end."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.certificate import verify_certificate
from common.charge import charge
from server.deployed import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "deployment"))
from books import accounted, began, charged

ROUNDS = 3
ENDED = ("finished", "stopped", "failed")
DELTA = 4e-7
BUDGET = f"target-epsilon = 200.0\nrun-epsilon = 9.0\nrun-delta = {DELTA}"
"""Room for more than twenty runs of the default ε in one federation."""


class Standing:
    """A federation that stands for several rows; one that a row has left in disorder is replaced by a new one.

    Args:
        kind: of federation. folders: makes a new folder. options: of the federation.
    """

    def __init__(self, kind, folders, **options):
        self._kind, self._folders, self._options = kind, folders, options
        self._made = self._sockets = None

    def second_round(self, quorum=1, rounds=ROUNDS):
        """With a run that has just sent its second round."""
        if self._made is not None and not self._made.is_sound:
            self.close()
        if self._made is None:
            self._sockets = tempfile.TemporaryDirectory(prefix="cl-")  # a socket's path is short
            self._made = self._kind(
                self._folders(),
                Path(self._sockets.name),
                budget=BUDGET,
                run=f"target-delta = {DELTA}\n",
                **self._options,
            )
            self._made.is_sound = False
            self._made.start_all()
        made = self._made
        made.is_sound = False
        made.run, made.rounds = made.submit(rounds=rounds, quorum=quorum), rounds
        made.wait("round 2 is sent", lambda: f"round 2/{rounds}: sent to" in made.run_log(made.run), 900)
        return made

    def close(self):
        if self._made is not None:
            self._made.stop()
            self._sockets.cleanup()
        self._made = self._sockets = None


def kill_child(federation, name, program):
    """``kill -9`` of a program that a supervisor keeps running; returns its process id."""
    found = federation.children(name, program)
    assert found, f"no {program} below {name}"
    os.kill(found[0], signal.SIGKILL)
    return found[0]


def resume(federation, *options):
    done = federation.runs("resume", federation.run, *options)
    assert done.returncode == 0, done.stderr
    time.sleep(2)


def finish(federation, limit_s=600, resumes=2):
    """To the end; a run that says that it can be resumed is resumed, as an operator would."""
    for _ in range(resumes + 1):
        ended = federation.wait_end(federation.run, limit_s)
        if ended["state"] == "finished":
            return ended
        assert ended["exit_code"] == 7, ended
        resume(federation)
    raise AssertionError(ended)


def settle(federation, limit_s=600):
    """Until the run is over or nobody works on it any more; then it is resumed if it has not ended."""
    folder = RunFolder(federation.home / "runs" / federation.run, federation.home)
    federation.wait(
        "the run ends or is left",
        lambda: federation.state(federation.run)["state"] in ENDED or not folder.is_held,
        limit_s,
    )
    if federation.state(federation.run)["state"] not in ENDED:
        resume(federation)


def check_books(federation, lost):
    """Both books hold every reservation that began, and at most ``lost`` more; the certificate says what they say."""
    verdict = verify_certificate(federation.home / "runs" / federation.run / "certificate.json")
    assert verdict.private
    assert verdict.certificate.absent == ()
    assert verdict.certificate.rounds_run == federation.rounds
    for name in federation.names:
        own = {use.reservation_id: use.event for use in began(federation, name, federation.run)}
        counted = {item.reservation_id: item.event for item in accounted(federation, name, federation.run)}
        assert own.keys() <= counted.keys(), f"{name}: the coordinator's book says less than the organisation's"
        assert len(counted) - len(own) <= lost
        assert len(counted) <= federation.rounds
        truth = charge(list(counted.values()), relation="add_remove", delta=DELTA).epsilon
        assert verdict.epsilons[name].epsilon == pytest.approx(truth, rel=1e-9)
        envelope = charged(federation, name, federation.run)
        assert envelope == pytest.approx(verdict.epsilons[name].envelope_epsilon, rel=1e-9)
        assert envelope >= truth * (1 - 1e-9)
        began_there = f"{len(own)} of them began; its ledger charges {envelope:.6f}"
        print(f"{name}: ε {truth:.6f} of {len(counted)} reservations, {began_there}")
    federation.is_sound = True
