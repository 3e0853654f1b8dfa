"""A simulation whose budgets are kept by a ``cloister accountant serve`` of its own: over mutual TLS and a socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from common.config import RunConfig
from common.errors import InvalidInput, Refused, Unavailable
from common.ledger import Ledger
from common.signing import SigningKey
from deploy.provisioning.certificates import Authority
from deploy.simulation.simulate import Watcher, quiet_warnings, simulate
from server.accountant import EmbeddedAccountant


class Service:
    """The accountant's process; it can be killed and started again on the same ledger."""

    def __init__(self, folder, address, tls=()):
        self.folder, self.address, self.tls = folder, address, tls
        self.ledger, self.key = folder / "accountant.sqlite", folder / "accountant.key"
        self.process = None

    def start(self):
        arguments = ["--ledger", self.ledger, "--key", self.key, "--address", self.address]
        arguments += self.tls or ["--insecure"]
        command = [sys.executable, "-m", "deploy.cli", "accountant", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = self.process.stdout.readline()
        assert "listens on" in line, line + self.process.stdout.read()

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=["tls", "socket"])
def served(request, tmp_path):
    """(the service, the settings with which a run reaches it)."""
    if request.param == "socket":
        service = Service(tmp_path, f"unix:{tmp_path}/a.sock")
        settings = {"accountant": f"grpc+unix://{tmp_path}/a.sock"}
    else:
        now = datetime.now(UTC)
        authority = Authority.create("test", now)
        pairs = {
            "service": authority.server("accountant", ["localhost"], now),
            "coordinator": authority.party("main", "coordinator", now),
        }
        files = {"authority": tmp_path / "authority.pem"}
        files["authority"].write_bytes(authority.pair.certificate)
        for name, pair in pairs.items():
            for kind, data in (("certificate", pair.certificate), ("key", pair.key)):
                files[f"{name}-{kind}"] = tmp_path / f"{name}.{kind}"
                files[f"{name}-{kind}"].write_bytes(data)
        address = f"localhost:{free_port()}"
        tls = ["--tls-certificate", files["service-certificate"], "--tls-key", files["service-key"]]
        service = Service(tmp_path, address, [*tls, "--tls-authority", files["authority"]])
        settings = {
            "accountant": f"grpcs://{address}",
            "accountant_certificate": str(files["coordinator-certificate"]),
            "accountant_key": str(files["coordinator-key"]),
            "accountant_authority": str(files["authority"]),
        }
    service.start()
    yield service, settings
    service.kill()


def run(values, watcher=None):
    with quiet_warnings():
        return simulate(RunConfig.from_mapping(values), watcher)


def test_a_run_on_the_service_that_is_killed_in_the_middle_ends_with_the_truth(served, options, tmp_path, cloister):
    service, settings = served

    class Killer(Watcher):
        def round_started(self, server_round, clients):
            if server_round == 2:
                service.kill()
                service.start()

    result = run(options(tmp_path / "run", **settings), Killer())
    last = result.metrics[-1]["epsilon"]
    for client in result.terms.clients:
        assert 0 < last[client.name] <= client.target_epsilon
    assert not (result.output / "ledger.sqlite").exists()
    assert cloister("certificate", "verify", str(result.output / "certificate.json")).code == 0
    service.kill()
    with Ledger(service.ledger) as ledger:
        accountant = EmbeddedAccountant(ledger, SigningKey.load(service.key))
        assert accountant.open(result.terms.run_id) == ()
        for client in result.terms.clients:
            assert accountant.spent(result.terms.run_id, client.name).epsilon == last[client.name]
    assert result.certificate.accountant_key == SigningKey.load(service.key).public_key


def test_an_accountant_that_stays_away_is_one_line_and_the_run_can_be_resumed(
    served, options, tmp_path, cloister, monkeypatch
):
    from server import remote_accountant

    service, settings = served
    output = tmp_path / "run"
    started = time.monotonic

    class Killer(Watcher):
        def round_started(self, server_round, clients):
            if server_round == 2:
                service.kill()

    real = remote_accountant.RemoteAccountant.__init__

    def impatient(self, *arguments, **options):
        real(self, *arguments, **{**options, "timeout_s": 2.0})

    with monkeypatch.context() as patch:
        patch.setattr(remote_accountant.RemoteAccountant, "__init__", impatient)
        began = started()
        with pytest.raises(Unavailable) as raised:
            run(options(output, **settings), Killer())
        assert started() - began < 60
    assert "\n" not in str(raised.value)
    assert f"cloister accountant serve --ledger LEDGER --key KEY --address {service.address}" in str(raised.value)
    assert raised.value.exit_code == 7
    service.start()
    found = cloister("simulate", "--json", output=str(output), resume=True)
    assert found.code == 0, found.err
    assert json.loads(found.out)["rounds"] == 3


def test_another_accountant_at_the_same_address_is_not_believed(served, options, tmp_path):
    service, settings = served

    class Stop(Watcher):
        def round_started(self, server_round, clients):
            if server_round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path / "run", **settings), Stop())
    service.kill()
    for file in (service.key, *tmp_path.glob("accountant.sqlite*")):
        file.unlink()
    service.start()
    with pytest.raises(Refused, match="began with the accountant"):
        run({"output": str(tmp_path / "run"), "resume": True})
    with pytest.raises(Refused, match="pinned"):
        run(options(tmp_path / "other", accountant_public_key=SigningKey.generate().public_key, **settings))


def test_an_accountant_that_nobody_started_is_one_line_with_the_command(options, tmp_path, cloister, monkeypatch):
    monkeypatch.setattr("server.accountants.CONNECT_TIMEOUT_S", 0.5)
    output = tmp_path / "run"
    found = cloister("simulate", **options(output, accountant=f"grpc+unix://{tmp_path}/nobody.sock"))
    assert found.code == 7
    errors = [line for line in found.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cloister accountant serve" in errors[0]
    assert not output.exists(), "nothing was begun"


@pytest.mark.parametrize(
    "accountant", ["grpc://localhost:1", "localhost:9443", "grpcs://localhost", "grpc+unix://a.sock", "remote"]
)
def test_an_address_that_cannot_be_meant_is_refused_by_name(accountant):
    with pytest.raises(InvalidInput, match=r"accountant.*grpcs://host:port"):
        RunConfig.from_mapping({"accountant": accountant})


def test_tls_without_its_files_says_which_command_makes_them(options, tmp_path, cloister):
    found = cloister("simulate", **options(tmp_path / "run", accountant="grpcs://localhost:1"))
    assert found.code == 2
    assert "cloister provision" in found.err
    missing = {name: str(tmp_path / "missing") for name in ("accountant_certificate", "accountant_key")}
    found = cloister(
        "simulate", **options(tmp_path / "run", accountant="grpcs://localhost:1", accountant_authority="x", **missing)
    )
    assert found.code == 2
    assert "cannot be read" in found.err
