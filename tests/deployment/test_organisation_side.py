"""What an organisation's own commands refuse, and what they say: settings, doctor, join, progress, supervision."""

import datetime
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from client.progress import ask_status, serve_status
from client.settings import TrainerSettings
from common.errors import InvalidInput, Refused, Unavailable
from deploy.commands.trainer import supernode_command
from deploy.running.doctor import Questions, _clock, examine, free_port, reach, worst
from deploy.running.processes import Service, Supervisor

NOW = 1_800_000_000.0


def certificate(path, days, now=NOW):
    """A certificate that ends ``days`` after ``now``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    end = datetime.datetime.fromtimestamp(now, datetime.UTC) + datetime.timedelta(days=days)
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(end - datetime.timedelta(days=400))
        .not_valid_after(end).sign(key, hashes.SHA256())
    )  # fmt: skip
    path.write_bytes(built.public_bytes(Encoding.PEM))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('model = "demo"\n', "data is missing"),
        ('data = "x"\nmodel = "demo"\nrnak = 3\n', "unknown setting 'rnak'"),
        ('data = "x"\nmodel = "demo"\nrank = 0\n', "rank"),
        ('data = "x"\nmodel = "demo"\nclasses = ["a", "a"]\n', "twice"),
        ('data = "x"\nmodel = "demo"\naddress = "unix:' + "a" * 120 + '"\n', "at most 107 bytes"),
        ('data = "x"\nmodel = "demo"\nholdout = 0.1\n', "unknown setting 'holdout'"),
        ("data = [", "not a TOML file"),
    ],
)
def test_unsound_trainer_settings_are_refused_by_name(tmp_path, text, says):
    path = tmp_path / "trainer.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=says):
        TrainerSettings.load(path)


def test_relative_paths_start_at_the_settings_file(tmp_path, monkeypatch):
    (tmp_path / "records.jsonl").write_text("{}\n")
    (tmp_path / "trainer.toml").write_text('data = "records.jsonl"\nmodel = "demo"\nrank = 3\n')
    monkeypatch.chdir("/")
    found = TrainerSettings.load(tmp_path / "trainer.toml")
    assert found.run.data == str(tmp_path / "records.jsonl")
    assert found.run.model == "demo"
    assert found.run.rank == 3
    assert found.address == f"unix:{tmp_path}/trainer.sock"
    assert found.ledger == tmp_path / "ledger.sqlite"


def test_a_policy_with_several_data_sets_needs_a_name(tmp_path):
    (tmp_path / "trainer.toml").write_text('data = "x"\nmodel = "demo"\n')
    found = TrainerSettings.load(tmp_path / "trainer.toml")
    assert found.dataset_of(("notes",)) == "notes"
    with pytest.raises(InvalidInput, match="letters, notes"):
        found.dataset_of(("notes", "letters"))


@pytest.mark.parametrize(
    ("days", "mark", "code", "says"),
    [(100, "ok", 0, "valid until"), (3, "warn", 0, "3 days"), (-1, "fail", 5, "expired"), (500, "fail", 5, "clock")],
)
def test_doctor_reads_the_certificate(tmp_path, days, mark, code, says):
    certificate(tmp_path / "ca.crt", days)
    found = list(examine(Questions(kit=tmp_path), lambda: NOW))
    assert (found[0].mark, worst(found)) == (mark, code)
    assert says in found[0].text


def test_doctor_names_a_missing_or_broken_certificate_and_the_mending_command(tmp_path):
    found = list(examine(Questions(kit=tmp_path), lambda: NOW))
    assert worst(found) == 2
    (tmp_path / "ca.crt").write_text("no certificate")
    found = list(examine(Questions(kit=tmp_path), lambda: NOW))
    assert worst(found) == 2
    assert "provision rotate" in found[0].text


def test_doctor_says_that_nobody_answers(tmp_path):
    found = list(examine(Questions(coordinator=f"127.0.0.1:{free_port()}", is_insecure=True), lambda: NOW))
    assert worst(found) == 7
    assert [one.mark for one in found] == ["fail", "warn"]


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:port", ":80"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        reach(address, None)


def test_a_clock_that_is_off_is_refused():
    date = "Fri, 15 Jan 2027 08:00:00 GMT"  # NOW
    assert "within 5 s" in _clock(date, NOW + 5)
    with pytest.raises(Refused, match="ahead of"):
        _clock(date, NOW + 120)
    with pytest.raises(Refused, match="behind"):
        _clock(date, NOW - 120)


def test_doctor_stops_at_a_policy_that_cannot_be_read(tmp_path):
    found = list(examine(Questions(policy=tmp_path / "policy.toml")))
    assert [one.check for one in found] == ["policy"]
    assert worst(found) == 2


def test_the_supernode_gets_authority_and_key_from_the_kit(tmp_path):
    plain = supernode_command("c:1", "unix:/t.sock", 9, None)
    assert "--insecure" in plain
    assert "--root-certificates" not in plain
    (tmp_path / "supernode.key").write_text("key")
    secure = supernode_command("c:1", "unix:/t.sock", 9, tmp_path)
    assert "--insecure" not in secure
    assert secure[secure.index("--root-certificates") + 1] == str(tmp_path / "ca.crt")
    assert secure[secure.index("--auth-supernode-private-key") + 1] == str(tmp_path / "supernode.key")
    assert secure[secure.index("--isolation") + 1] == "subprocess"


def test_the_status_socket_is_the_owners_alone_and_replaces_a_dead_one(tmp_path):
    path = tmp_path / "status.sock"
    path.write_text("left by a killed trainer")
    server = serve_status(path, lambda: {"state": "idle"})
    try:
        assert ask_status(path) == {"state": "idle"}
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(Unavailable, match="no trainer answers"):
        ask_status(tmp_path / "other.sock")


def supervise_until(services, condition, said=None, limit_s=60.0):
    """Run a supervisor here until ``condition`` holds, then stop it as an operator would."""
    held = []

    def stop():
        deadline = time.monotonic() + limit_s
        while not (holds := condition()) and time.monotonic() < deadline:
            time.sleep(0.05)
        held.append(holds)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=stop, daemon=True).start()
        Supervisor(services, (said if said is not None else []).append).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert held == [True]


def test_a_dead_service_is_started_again_and_a_stop_ends_all(tmp_path):
    log = tmp_path / "starts"
    code = (
        "import os, sys, time; open(sys.argv[1], 'a').write(os.environ['FLWR_TELEMETRY_ENABLED'] + chr(10));"
        "time.sleep(0 if len(open(sys.argv[1]).readlines()) < 2 else 60)"
    )
    said = []
    one = Service("one", [sys.executable, "-S", "-c", code, str(log)])
    supervise_until([one], lambda: log.exists() and len(log.read_text().splitlines()) == 2, said)
    assert log.read_text().splitlines() == ["0", "0"]
    assert sum("started" in line and "process" in line for line in said) == 2
    assert any("ended (exit code 0)" in line for line in said)


WITH_A_CHILD = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(sys.argv[1], "a") as log:
    log.write(f"{os.getpid()} {child.pid}\\n")
time.sleep(600)
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("may_leave_work", [False, True])
def test_what_a_killed_service_had_started_ends_with_it_unless_it_may_go_on(tmp_path, may_leave_work):
    log = tmp_path / "starts"
    killed = []

    def started():
        return (
            [[int(number) for number in line.split()] for line in log.read_text().splitlines()] if log.exists() else []
        )

    def second_start():
        if started() and not killed:
            killed.append(started()[0])
            os.kill(killed[0][0], signal.SIGKILL)
        return len(started()) == 2 and is_running(killed[0][1]) == may_leave_work

    command = [sys.executable, "-S", "-c", WITH_A_CHILD, str(log)]
    try:
        supervise_until([Service("one", command, may_leave_work=may_leave_work)], second_start)
        deadline = time.monotonic() + 30
        while any(map(is_running, started()[1])):  # a stop ends what the last one had started
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if killed and is_running(killed[0][1]):
            os.kill(killed[0][1], signal.SIGKILL)
