"""A coordinator and its organisations as compose projects: built from this tree, provisioned, brought up, looked at.

The records are MedQuAD's where they are (CLOISTER_DATA or ../shared/data), else those of the embedded demo.
"""

import contextlib
import gzip
import http.client
import http.server
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.backbone import backbone_hash
from deploy.cli import app
from deploy.demo.records import generate
from deploy.provisioning.provision import Federation, init

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CLOISTER_DATA", ROOT.parent / "shared" / "data")) / "medquad_by_institution.jsonl.gz"
ENGINE = Path(os.environ.get("CLOISTER_ENGINE", "/var/tmp/cloister-engine"))
IMAGES = ("coordinator", "supernode", "proxy", "trainer")
SILOS = {"clinic-a": "NHLBI", "clinic-b": "CDC"}
PUBLIC = "SeniorHealth"
MADE_UP = {"NHLBI": "harbour-hospital", "CDC": "north-clinic", PUBLIC: "county-office"}
"""An institution's place is taken by an organisation of the demo where the real records are not there."""
RECORDS = 200
USER = 10001
WHEELS_PORT = 18099
"""Always the same, because it is part of what a layer is cached by."""

POLICY = """\
organisation = "{name}"
min-noise-multiplier = 0.1
max-sample-rate = 0.5
max-steps-per-round = 2
backbones = ["{backbone}"]
coordinator-keys = ["{coordinator}"]
accountant-keys = ["{accountant}"]

[datasets.answers]
declared-records = {records}
target-epsilon = 20.0
run-epsilon = 9.0
run-delta = 4e-6
"""
RUN = """\
rounds = {rounds}
expected-batch-size = 8
max-length = 64
rank = 4
quorum = {quorum}
round-deadline-s = 400
target-epsilon = 8.0
target-delta = 4e-6
server-learning-rate = 0.05
accountant = "grpcs://accountant:9443"
accountant-certificate = "/etc/cloister/superexec/client.crt"
accountant-key = "/etc/cloister/superexec/client-tls.key"
accountant-authority = "/etc/cloister/superexec/ca.crt"
accountant-public-key = "{accountant}"
"""
# The organisations' containers meet the proxy in its own outer network: on one machine an engine keeps published ports
# of one bridge from the others.
MEET = "networks: {{outside: {{external: true, name: {name}}}}}\n"


def run(*command, env=None, check=True, limit_s=300, text=None):
    """A finished command; compose files take their variables from ``env`` alone (CLOISTER_DATA is the tests' too)."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**inherited, **(env or {})},
        timeout=limit_s,
        input=text,
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


@contextlib.contextmanager
def local_wheels(engine):
    """Build arguments for pip; a folder of wheels that this machine installs from is served to the build."""
    folder = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere"))
    if not folder.is_dir():
        yield []
        return
    inspect = "{{(index .IPAM.Config 0).Subnet}}"
    subnet = run("docker", "network", "inspect", "bridge", "--format", inspect, env=engine).stdout.strip()
    host = str(next(ipaddress.ip_network(subnet).hosts()))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer((host, WHEELS_PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield [f"--build-arg=PIP_FIND_LINKS=http://{host}:{WHEELS_PORT}/", f"--build-arg=PIP_TRUSTED_HOST={host}"]
        finally:
            server.shutdown()
            thread.join()


class Project:
    """One compose project."""

    def __init__(self, name, side, environment, *overlays):
        self.name, self.environment = name, environment
        files = [ROOT / "deploy" / side / "compose.yaml", *overlays]
        self._compose = ["docker", "compose", "--project-name", name, "--env-file", "/dev/null"]
        self._compose += [part for file in files for part in ("--file", str(file))]

    def __call__(self, *arguments, **options):
        return run(*self._compose, *arguments, env=self.environment, **options)

    def up(self):
        done = self("up", "--detach", "--wait", "--no-build", check=False, limit_s=400)
        if done.returncode:
            pytest.fail(f"{done.stderr[-2000:]}\n{self('logs', '--tail', '60', check=False).stdout[-6000:]}")

    def inside(self, service, *command, **options):
        return self("exec", "-T", service, *command, **options)

    def container(self, service):
        return self("ps", "--all", "--quiet", service).stdout.strip()

    def kill(self, service):
        """End the container's first process as a crash would, so that the restart policy applies."""
        inspect = run("docker", "inspect", "--format", "{{.State.Pid}}", self.container(service), env=self.environment)
        os.kill(int(inspect.stdout), signal.SIGKILL)

    def down(self):
        """End it and forget its volumes, those of an overlay too."""
        self("down", "--volumes", "--timeout", "5", check=False)
        own = ("--quiet", "--filter", f"label=com.docker.compose.project={self.name}")
        left = run("docker", "volume", "ls", *own, env=self.environment, check=False).stdout.split()
        if left:
            run("docker", "volume", "rm", "--force", *left, env=self.environment, check=False)


class Deployment:
    """A provisioned coordinator and its organisations, up and healthy."""

    def __init__(self, folder, variables):
        self.folder, self.variables = folder, variables
        init(folder / "federation", "proxy:8443", datetime.now(UTC))
        self.federation = Federation(folder / "federation")
        (folder / "runs").mkdir()
        own = {"CLOISTER_FEDERATION": folder / "federation" / "coordinator", "CLOISTER_RUNS": folder / "runs"}
        own |= {"CLOISTER_LISTEN": "127.0.0.1:0", "CLOISTER_DASHBOARD_LISTEN": "127.0.0.1:0"}
        self.coordinator = Project("cloister-test", "coordinator", self._with(own))
        self.clients = {name: self._client(name, silo) for name, silo in SILOS.items()}
        self.federation.add("court", datetime.now(UTC), role="auditor")
        give(folder / "federation" / "coordinator")

    def _with(self, own):
        return {**self.variables, **{name: str(value) for name, value in own.items()}}

    def _client(self, name, silo):
        kit = self.federation.add(name, datetime.now(UTC))
        home = self.folder / name
        for part in ("data", "settings"):
            (home / part).mkdir(parents=True)
        write_records(home / "data" / "records.jsonl", silo)
        backbone = home / "backbone"
        packed = CliRunner().invoke(
            app, ["backbone", "pack", str(ROOT / "deploy/demo/backbone"), "--output", str(backbone)]
        )
        assert packed.exit_code == 0, packed.output
        keys = {side: (kit / f"{side}.pub").read_text().strip() for side in ("coordinator", "accountant")}
        policy = POLICY.format(name=name, backbone=backbone_hash(backbone), records=RECORDS, **keys)
        (home / "settings" / "policy.toml").write_text(policy)
        example = (ROOT / "deploy" / "client" / "trainer.example.toml").read_text()
        example = example.replace('"prompt"', '"question"').replace('"completion"', '"answer"')
        (home / "settings" / "trainer.toml").write_text(example + "max-length = 64\nrank = 4\nthreads = 1\n")
        overlay = home / "meet.yaml"
        overlay.write_text(MEET.format(name=f"{self.coordinator.name}_outside"))
        give(kit, home / "data", home / "settings")
        own = {"CLOISTER_KIT": kit, "CLOISTER_SETTINGS": home / "settings", "CLOISTER_DATA": home / "data"}
        own["CLOISTER_BACKBONE"] = backbone
        return Project(f"cloister-test-{name}", "client", self._with(own), overlay)

    def key(self, side):
        path = self.federation.folder / "coordinator" / "superexec" / f"{side}.pub"
        return path.read_text().strip()

    def submit(self, rounds, quorum):
        text = RUN.format(rounds=rounds, quorum=quorum, accountant=self.key("accountant"))
        (self.folder / "runs" / f"{rounds}.toml").write_text(text)
        path = f"/etc/cloister/runs/{rounds}.toml"
        submitted = self.command("submit", path, "--clients", str(len(SILOS)), "--json")
        return json.loads(submitted.stdout)["run_id"]

    def command(self, *arguments, **options):
        return self.coordinator.inside("superexec", "cloister", "coordinator", *arguments, **options)

    def show(self, run_id):
        asked = self.command("runs", "show", run_id, "--json", check=False)
        return json.loads(asked.stdout) if asked.returncode == 0 else {"state": "unknown", "round": 0, "error": None}

    def wait(self, run_id, done, limit_s):
        deadline = time.monotonic() + limit_s
        while not done(found := self.show(run_id)):
            if time.monotonic() > deadline:
                logs = self.command("runs", "logs", run_id, check=False)
                pytest.fail(f"after {limit_s} s: {found}\n{logs.stdout[-4000:]}{logs.stderr[-1000:]}")
            time.sleep(2)
        return found

    def page(self, path, kit):
        """Status and body of a page of the dashboard, asked as docs/dashboard.md says; ``kit`` is whose certificate."""
        host, port = self.coordinator("port", "proxy", "8444").stdout.strip().rsplit(":", 1)
        context = ssl.create_default_context(cafile=str(self.federation.folder / "kits" / "court" / "ca.crt"))
        if kit is not None:
            folder = self.federation.folder / "kits" / kit
            context.load_cert_chain(folder / "client.crt", folder / "client-tls.key")
        connection = http.client.HTTPConnection("proxy", timeout=60)
        connection.sock = context.wrap_socket(socket.create_connection((host, int(port)), 60), server_hostname="proxy")
        connection.request("GET", path, headers={"Accept": "text/html"})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, body

    def certificate(self, run_id):
        """The certificate, after `cloister certificate verify` with the pinned key has agreed with it."""
        text = self.coordinator.inside("superexec", "cat", f"/state/runs/{run_id}/certificate.json").stdout
        path = self.folder / f"{run_id}.json"
        path.write_text(text)
        verify = ["certificate", "verify", str(path), "--json"]
        verify += [part for side in ("coordinator", "accountant") for part in ("--public-key", self.key(side))]
        checked = CliRunner().invoke(app, verify)
        assert checked.exit_code == 0, (checked.output, checked.exception)
        return json.loads(text)

    def spent(self, name):
        asked = self.clients[name].inside(
            "trainer", "cloister", "client", "budget", "--policy", "/etc/cloister/settings/policy.toml", "--ledger",
            "/state/ledger.sqlite", "--json",
        )  # fmt: skip
        return json.loads(asked.stdout)["answers"]


def give(*folders):
    """To the containers' user, as docs/deployment.md says."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER)


def records(institution):
    """RECORDS rows with ``question`` and ``answer``."""
    if DATA.exists():
        with gzip.open(DATA, "rt", encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["silo"] == institution][:RECORDS]
    else:
        made = generate(MADE_UP[institution], RECORDS, seed=0)
        rows = [{"question": row["prompt"], "answer": row["completion"]} for row in made]
    assert len(rows) == RECORDS
    return [{name: row[name] for name in ("question", "answer")} for row in rows]


def write_records(path, institution):
    path.write_text("".join(json.dumps(row) + "\n" for row in records(institution)))
