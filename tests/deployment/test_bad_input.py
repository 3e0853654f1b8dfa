"""What is wrong before a run, and what is said about it: the cause, and the command that mends it.

No data is read in any of these cases (the records do not even exist here: to open them would be another error), and no
line of a ledger is written. Kits of another federation, unknown nodes and backbones are in test_loopback.py, clients
of another version in test_grpc_trainer.py and tests/server/test_exchange.py, compose files without their values in
tests/provision/test_compose.py.
"""

import datetime
import json
import resource
import shutil
import ssl
import sys
import threading
from contextlib import contextmanager
from datetime import UTC
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from client.backbone import backbone_hash
from client.settings import TrainerSettings
from common.errors import Unavailable
from common.ledger import Ledger
from common.release import own_version
from common.signing import SigningKey
from deploy import cli
from deploy.commands import trainer as trainer_commands
from deploy.provisioning.provision import Federation, init
from deploy.running import doctor
from deploy.running.doctor import Questions, examine, free_port, worst
from deploy.workshop import DEMO_BACKBONE

sys.path.insert(0, str(Path(__file__).parent))
from loopback import BUDGET, POLICY, TRAINER

NOW = datetime.datetime.now(UTC).replace(microsecond=0)
LONG_AGO = NOW - datetime.timedelta(days=4000)


@pytest.fixture
def cloister(monkeypatch, capsys):
    """cloister(*arguments) -> exit code and everything that was said, in this process; nothing may be started."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cloister", *map(str, arguments)])
        monkeypatch.setattr(trainer_commands, "Supervisor", lambda *_: pytest.fail("a node was started"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, text=" ".join((said.out + said.err).split()))

    return run


def kit_made(folder, now, coordinator="127.0.0.1:8443"):
    """The folder of a federation that was made at ``now``, and the kit of one organisation."""
    init(folder, coordinator, now)
    return Federation(folder).add("clinic-a", now)


def test_an_expired_kit_joins_nothing_and_names_the_command_that_renews_it(tmp_path, cloister):
    kit = kit_made(tmp_path / "federation", LONG_AGO)
    refused = cloister("client", "join", "--kit", kit)
    assert refused.code == 5
    assert "ca.crt: expired on" in refused.text
    assert "client.crt: expired on" in refused.text
    assert "ask the coordinator for a new kit ('cloister provision rotate')" in refused.text


class Silent(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """served(side) -> an address that answers with the certificate of that folder."""
    servers = []

    def serve(side, port):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(side / "tls.crt", side / "tls.key")
        server = HTTPServer(("127.0.0.1", port), Silent)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a client that hangs up
def test_a_coordinator_whose_certificate_has_expired_is_not_joined_and_both_sides_commands_are_named(
    tmp_path, cloister, served
):
    """Its servers' certificates last a year or two, the authority ten."""
    port = free_port()
    kit = kit_made(tmp_path / "federation", NOW - datetime.timedelta(days=1200), f"127.0.0.1:{port}")
    served(tmp_path / "federation" / "coordinator" / "superlink", port)
    refused = cloister("client", "join", "--kit", kit)
    assert refused.code == 5
    assert "certificate has expired" in refused.text
    assert "'cloister provision rotate --servers'" in refused.text
    assert "('cloister provision rotate')" in refused.text


def test_a_kit_made_for_another_version_is_said_before_anything_starts(tmp_path):
    kit = kit_made(tmp_path / "federation", NOW)
    body = json.loads((kit / "kit.json").read_text())
    assert body["version"] == own_version()
    said = {one.check: one for one in examine(Questions(kit=kit), NOW.timestamp)}
    assert (said["version"].mark, said["version"].text) == ("ok", own_version())
    (kit / "kit.json").write_text(json.dumps(body | {"version": "0.0.9"}))
    found = list(examine(Questions(kit=kit), NOW.timestamp))
    (version,) = (one for one in found if one.check == "version")
    assert (version.mark, worst(found)) == ("warn", 0)
    assert "pip install 'cloister==0.0.9'" in version.text


def test_a_coordinator_that_cannot_be_reached_is_named_with_what_to_look_at(tmp_path, cloister):
    address = f"127.0.0.1:{free_port()}"
    kit = kit_made(tmp_path / "federation", NOW, address)
    for command in ("join", "doctor"):
        refused = cloister("client", command, "--kit", kit)
        assert refused.code == 7
        assert f"{address}: the coordinator cannot be reached" in refused.text
        assert "check the address, the port and the firewall" in refused.text


def test_a_run_is_not_submitted_to_a_superlink_that_does_not_answer(tmp_path, cloister):
    (tmp_path / "run.toml").write_text("rounds = 1\n")
    refused = cloister(
        "coordinator", "submit", tmp_path / "run.toml", "--clients", "1", "--folder", tmp_path / "home", "--superlink",
        f"127.0.0.1:{free_port()}",
    )  # fmt: skip
    assert refused.code == 7
    assert "is 'cloister coordinator serve' running?" in refused.text
    assert not (tmp_path / "home" / "ledger.sqlite").exists()
    for state in (tmp_path / "home" / "runs").glob("*/state.json"):
        assert json.loads(state.read_text())["state"] == "submitted"


@pytest.fixture
def organisation(tmp_path):
    """Policy and settings of one organisation whose records do not exist: to read them would be another error."""
    own = tmp_path / "east"
    own.mkdir()
    keys = {side: SigningKey.generate().public_key for side in ("coordinator", "accountant")}
    policy = POLICY.format(name="east", backbone=backbone_hash(DEMO_BACKBONE), budget=BUDGET, **keys)
    (own / "policy.toml").write_text(policy)
    (own / "trainer.toml").write_text(TRAINER.format(name="east", backbone=DEMO_BACKBONE, sockets=own))
    return own


@contextmanager
def full_disk():
    """No file of this process may grow past a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("lacks", ["client.key", "ledger.sqlite"])
def test_a_trainer_on_a_full_disk_says_so_before_it_loads_a_model_or_reads_a_record(organisation, monkeypatch, lacks):
    from deploy.running import trainer_process

    monkeypatch.setattr(trainer_process, "open_workshop", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(trainer_process, "read_examples", lambda *_: pytest.fail("records were read"))
    settings = TrainerSettings.load(organisation / "trainer.toml")
    if lacks == "ledger.sqlite":
        SigningKey.generate().save(organisation / "client.key")
    with full_disk(), pytest.raises(Unavailable, match=rf"{organisation}/{lacks}.*make room") as said:
        trainer_process.open_trainer(organisation / "policy.toml", settings)
    assert said.value.exit_code == 7
    ledger = organisation / "ledger.sqlite"
    assert not ledger.exists() or ledger.stat().st_size == 0


def test_doctor_says_how_much_room_is_missing(organisation, monkeypatch):
    nearly_full = shutil._ntuple_diskusage(1 << 40, (1 << 40) - (5 << 20), 5 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: nearly_full)
    found = list(examine(Questions(policy=organisation / "policy.toml", reads_data=False), NOW.timestamp))
    (disk,) = (one for one in found if one.check == "disk")
    assert (disk.mark, worst(found)) == ("fail", 7)
    assert "5 MiB free, 1024 are needed for ledger and replies: make room" in disk.text


@pytest.mark.parametrize("lacks", ["tls.crt", "tls.key", "ca.crt"])
def test_an_accountant_without_its_secrets_names_the_file_and_provision_and_writes_no_line(tmp_path, cloister, lacks):
    init(tmp_path / "federation", "127.0.0.1:8443", NOW)
    own = tmp_path / "federation" / "coordinator" / "accountant"
    (own / lacks).unlink()
    tls = {"certificate": "tls.crt", "key": "tls.key", "authority": "ca.crt"}
    refused = cloister(
        "accountant", "serve", "--ledger", tmp_path / "ledger.sqlite", "--key", own / "accountant.key", "--address",
        f"127.0.0.1:{free_port()}", *(part for name, file in tls.items() for part in (f"--tls-{name}", own / file)),
    )  # fmt: skip
    assert refused.code == 2
    assert f"{own / lacks}: cannot be read" in refused.text
    assert "'cloister provision' makes it" in refused.text
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.verify() == 0


@pytest.mark.parametrize("service", [("coordinator", "serve"), ("accountant", "serve", "--ledger", "l", "--key", "k")])
def test_a_service_without_certificates_says_who_makes_them(tmp_path, monkeypatch, cloister, service):
    monkeypatch.chdir(tmp_path)
    refused = cloister(*service)
    assert refused.code == 2
    assert "'cloister provision' makes them" in refused.text
    assert list(tmp_path.iterdir()) == []


def test_a_coordinators_certificate_that_is_not_there_is_named(tmp_path, cloister):
    options = [part for name in ("certificate", "key", "authority") for part in (f"--tls-{name}", tmp_path / name)]
    refused = cloister("coordinator", "serve", "--folder", tmp_path / "home", *options)
    assert refused.code == 2
    assert f"{tmp_path / 'certificate'}: there is no such file" in refused.text
    assert not (tmp_path / "home").exists()
