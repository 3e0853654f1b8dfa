"""Real processes on loopback, by the documented commands: SuperLink, two SuperNodes, two trainers, three rounds."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from client.progress import ask_status
from common.certificate import verify_certificate
from common.charge import charge

sys.path.insert(0, str(Path(__file__).parent))
from books import accounted, began
from loopback import Loopback

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def sockets():
    with tempfile.TemporaryDirectory(prefix="cl-") as folder:  # a socket's path is short
        yield Path(folder)


@pytest.fixture(scope="module")
def federation(tmp_path_factory, sockets):
    """After three rounds, with everything still running."""
    made = Loopback(tmp_path_factory.mktemp("federation"), sockets)
    try:
        made.start_coordinator()
        for name in made.names:
            made.start_trainer(name)
        made.wait_listening()
        for name in made.names:
            made.start_node(name)
        made.run = made.submit(rounds=3)
        made.ended = made.wait_end(made.run)
        yield made
    finally:
        made.stop()


def test_three_rounds_end_with_an_adapter_and_a_certificate_that_verifies(federation):
    assert federation.ended["state"] == "finished", federation.ended
    folder = federation.home / "runs" / federation.run
    assert [line["round"] for line in federation.metrics(federation.run)] == [0, 1, 2, 3]
    with np.load(folder / "adapter.npz") as adapter:
        assert all(np.isfinite(adapter[name]).all() for name in adapter.files)
        assert any(np.any(adapter[name]) for name in adapter.files)
    verified = federation.call("certificate", "verify", str(folder / "certificate.json"))
    assert verified.returncode == 0, verified.stderr
    assert verify_certificate(folder / "certificate.json").certificate.rounds_run == 3


def test_epsilon_is_the_same_in_both_books(federation):
    epsilons = federation.metrics(federation.run)[-1]["epsilon"]
    for name in federation.names:
        own = began(federation, name, federation.run)
        assert {item.reservation_id for item in own} == {
            item.reservation_id for item in accounted(federation, name, federation.run)
        }
        truth = charge([item.event for item in own], relation="add_remove", delta=1e-5).epsilon
        assert len(own) == 3
        assert epsilons[name] == pytest.approx(truth, rel=1e-9)


def test_the_trainer_tells_its_own_organisation_what_is_left(federation, sockets):
    status = ask_status(sockets / "east-status.sock")
    assert status["organisation"] == "east"
    assert status["answered"] == 3
    assert status["budget"]["epsilon"] == pytest.approx(8.0, rel=1e-2)
    assert (sockets / "east-status.sock").stat().st_mode & 0o077 == 0


def test_a_run_can_be_looked_at(federation):
    shown = federation.call("coordinator", "runs", "show", federation.run, "--folder", str(federation.home), "--json")
    found = json.loads(shown.stdout)
    assert (found["state"], found["round"], found["rounds"], found["certificate"]) == ("finished", 3, 3, True)
    log = (federation.home / "runs" / federation.run / "run.log").read_text()
    assert "round 3/3: sent to east, west" in log


def test_a_second_trainer_on_one_ledger_is_refused(federation):
    refused = federation.call("client", "trainer", "--policy", str(federation.folder / "east" / "policy.toml"))
    assert refused.returncode == 5
    assert "another" in refused.stderr


def test_another_backbone_is_refused_before_ledger_or_data(federation, tmp_path):
    policy = (federation.folder / "east" / "policy.toml").read_text()
    (tmp_path / "policy.toml").write_text(policy.replace('backbones = ["', 'backbones = ["0'))
    settings = (federation.folder / "east" / "trainer.toml").read_text()
    (tmp_path / "trainer.toml").write_text(settings.replace('"records.jsonl"', '"/nowhere/records.jsonl"'))
    refused = federation.call("client", "trainer", "--policy", str(tmp_path / "policy.toml"))
    assert refused.returncode == 5
    assert "its hash is" in refused.stderr
    assert "backbone verify" in refused.stderr
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_wrong_coordinator_address_says_what_to_check(federation):
    refused = federation.call("client", "join", "--coordinator", "127.0.0.1:1", "--insecure")
    assert refused.returncode == 7
    assert "cannot be reached" in refused.stderr


def test_a_finished_run_is_not_started_again(federation):
    refused = federation.call(
        "coordinator", "runs", "resume", federation.run, "--folder", str(federation.home),
        "--superlink", federation.address,
    )  # fmt: skip
    assert refused.returncode == 5
    assert "is finished" in refused.stderr
