"""Real processes on loopback, by the documented commands: kits, TLS, the door, SuperLink, two SuperNodes, two trainers.

Where nginx is installed the organisations come through the deployment's own door; without it they reach the SuperLink's
TLS directly.
"""

import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from client.progress import ask_status
from common.certificate import verify_certificate
from common.charge import charge
from common.errors import Refused
from deploy.provisioning.provision import Federation, init, request_keys

sys.path.insert(0, str(Path(__file__).parent))
from books import accounted, began
from secured import Secured

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def sockets():
    with tempfile.TemporaryDirectory(prefix="cl-") as folder:  # a socket's path is short
        yield Path(folder)


@pytest.fixture(scope="module")
def federation(tmp_path_factory, sockets):
    """After three rounds, with everything still running."""
    made = Secured(tmp_path_factory.mktemp("federation"), sockets)
    try:
        made.start_all()
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
    keys = [federation.public_key(side) for side in ("coordinator", "accountant")]
    keys += [(kit / "client.pub").read_text().strip() for kit in federation.kits.values()]
    pinned = [part for key in keys for part in ("--public-key", key)]
    verified = federation.call("certificate", "verify", str(folder / "certificate.json"), *pinned, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["unpinned"] == []
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
    found = json.loads(federation.runs("show", federation.run, "--json").stdout)
    assert (found["state"], found["round"], found["rounds"], found["certificate"]) == ("finished", 3, 3, True)
    assert "round 3/3: sent to east, west" in federation.run_log(federation.run)


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


def test_the_kit_of_another_federation_does_not_join(federation, tmp_path):
    """Its authority did not sign this coordinator's certificate: the check before joining says so; nothing starts."""
    init(tmp_path / "other", f"127.0.0.1:{federation.door_port}", datetime.now(UTC))
    kit = Federation(tmp_path / "other").add("east", datetime.now(UTC))
    address = json.loads((federation.kits["east"] / "kit.json").read_text())["coordinator"]
    refused = federation.call("client", "join", "--kit", str(kit), "--coordinator", address)
    assert refused.returncode == 5, refused.stderr
    assert "does not verify" in refused.stderr
    assert "'cloister provision rotate'" in refused.stderr


def test_a_node_that_nobody_registered_gets_nothing_and_hears_whose_command_mends_it(federation, tmp_path):
    """East's kit with a node key of its own making: the authority is right, the SuperLink does not know the key."""
    kit, stranger = tmp_path / "kit", tmp_path / "stranger"
    shutil.copytree(federation.kits["east"], kit)
    request_keys(stranger, "east")
    shutil.copy(stranger / "private" / "supernode.key", kit / "supernode.key")
    books = {name: federation.client_ledger(name).read_bytes() for name in federation.names}
    federation.start("stranger", "client", "join", "--kit", str(kit), "--trainer", "unix:/nowhere/trainer.sock")
    try:
        told = "does not know the node key of this kit"
        federation.wait("the node is told", lambda: told in federation.log("stranger"), 200)
        said = federation.log("stranger")
        assert "'cloister provision rotate'" in said
        assert "'cloister provision nodes'" in said
        assert "SuperNode ID" not in said  # Flower prints it once a node is let in
    finally:
        stranger_node = federation.processes.pop("stranger")
        stranger_node.terminate()
        stranger_node.wait(60)
    assert {name: federation.client_ledger(name).read_bytes() for name in federation.names} == books


def test_a_wrong_coordinator_address_says_what_to_check(federation):
    kit = federation.kits["east"]
    refused = federation.call("client", "join", "--kit", str(kit), "--coordinator", "127.0.0.1:1")
    assert refused.returncode == 7
    assert "cannot be reached" in refused.stderr


def test_a_finished_run_is_not_started_again(federation):
    refused = federation.runs("resume", federation.run)
    assert refused.returncode == 5
    assert "is finished" in refused.stderr


def test_a_trainer_set_otherwise_is_refused_by_the_settings_name_before_anything_is_sent(federation):
    """The run asks for another scale of the adapter than the trainers hold: same shapes, same hashes."""
    federation.run_lines += "lora-alpha = 32.0\n"
    run = federation.submit(rounds=1)
    ended = federation.wait_end(run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 2)
    assert "lora-alpha is 16.0 in its trainer.toml and 32.0 in this run" in ended["error"]
    for name in federation.names:
        assert not began(federation, name, run)
        with pytest.raises(Refused, match="is not registered"):  # the run never reached the ledger
            accounted(federation, name, run)
