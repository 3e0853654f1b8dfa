"""A coordinator and two organisations as containers, from three compose projects, on real records.

`make test-deployment`. The engine comes from engine.sh unless one answers already; where none can run, these tests say
so in one line and tests/provision/test_compose.py has still checked the compose files.
"""

import contextlib
import gzip
import http.server
import ipaddress
import json
import os
import re
import shutil
import signal
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
from deploy.provision import Federation, init

pytestmark = [pytest.mark.slow, pytest.mark.containers, pytest.mark.data, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CLOISTER_DATA", ROOT.parent / "shared" / "data")) / "medquad_by_institution.jsonl.gz"
ENGINE = Path(os.environ.get("CLOISTER_ENGINE", "/var/tmp/cloister-engine"))
IMAGES = ("coordinator", "supernode", "proxy", "trainer")
SILOS = {"clinic-a": "NHLBI", "clinic-b": "CDC"}
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
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=limit_s,
        input=text,
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


@pytest.fixture(scope="module")
def engine():
    """Variables under which `docker` reaches an engine with Compose and the base image."""
    if not DATA.exists():
        pytest.skip(f"{DATA} is missing (CLOISTER_DATA names the folder of real records)")
    had_one = shutil.which("docker") and run("docker", "info", check=False).returncode == 0
    if had_one and run("docker", "compose", "version", check=False).returncode == 0:
        yield {}
        return
    up = run(ROOT / "tests" / "deployment" / "engine.sh", "up", ENGINE, check=False, limit_s=900)
    if up.returncode == 3:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    assert up.returncode == 0, up.stderr
    yield dict(line.split("=", 1) for line in up.stdout.splitlines() if line.startswith("DOCKER_"))
    run(ROOT / "tests" / "deployment" / "engine.sh", "down", ENGINE)


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


@pytest.fixture(scope="module")
def images(engine):
    """All four, built one after the other from this tree."""
    with local_wheels(engine) as arguments:
        for target in IMAGES:
            options = ["--file", ROOT / "deploy" / "Dockerfile", "--target", target, "--tag", f"cloister/{target}:test"]
            run("docker", "buildx", "build", "--load", *options, *arguments, ROOT, env=engine, limit_s=1200)
    return {f"CLOISTER_{name.upper()}_IMAGE": f"cloister/{name}:test" for name in IMAGES}


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
        self("down", "--volumes", "--timeout", "5", check=False)


class Deployment:
    """A provisioned coordinator and its organisations, up and healthy."""

    def __init__(self, folder, variables):
        self.folder, self.variables = folder, variables
        init(folder / "federation", "proxy:8443", datetime.now(UTC))
        self.federation = Federation(folder / "federation")
        (folder / "runs").mkdir()
        own = {"CLOISTER_FEDERATION": folder / "federation" / "coordinator", "CLOISTER_RUNS": folder / "runs"}
        own["CLOISTER_LISTEN"] = "127.0.0.1:0"
        self.coordinator = Project("cloister-test", "coordinator", self._with(own))
        self.clients = {name: self._client(name, silo) for name, silo in SILOS.items()}
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
            time.sleep(1)
        return found

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


def write_records(path, silo):
    with gzip.open(DATA, "rt", encoding="utf-8") as lines, path.open("w") as out:
        rows = [row for row in map(json.loads, lines) if row["silo"] == silo][:RECORDS]
        assert len(rows) == RECORDS
        out.writelines(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows)


@pytest.fixture(scope="module")
def deployment(engine, images, tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"), {**engine, **images})
    projects = [made.coordinator, *made.clients.values()]
    try:
        for project in projects:
            project.up()
        yield made
    finally:
        for project in reversed(projects):
            project.down()


@pytest.fixture(scope="module")
def finished(deployment):
    """A run of three rounds, to its end."""
    run_id = deployment.submit(3, len(SILOS))
    found = deployment.wait(run_id, lambda found: found["state"] in ("finished", "failed"), 1200)
    assert found["state"] == "finished", found
    return run_id


OVERLAYS = {
    "coordinator": ((), ("postgres",), ("evaluator",), ("evaluator", "gpu"), ("postgres", "evaluator", "gpu")),
    "client": ((), ("gpu",)),
}


@pytest.mark.parametrize(("side", "overlays"), [(side, one) for side, some in OVERLAYS.items() for one in some])
def test_compose_takes_every_overlay_and_misses_every_value(engine, side, overlays):
    """The second witness of tests/provision/test_compose.py: Compose itself reads the files."""
    names = ["compose.yaml", *(f"compose.{one}.yaml" for one in overlays)]
    files = [part for name in names for part in ("--file", ROOT / "deploy" / side / name)]
    needed = set()
    while True:
        environment = {**engine, **dict.fromkeys(needed, "/somewhere")}
        command = ["docker", "compose", "--env-file", "/dev/null", *files, "config", "--quiet"]
        asked = run(*command, env=environment, check=False)
        if asked.returncode == 0:
            break
        (missing,) = re.findall(r"variable (\w+) is missing a value: \S", asked.stderr)
        assert missing not in needed
        needed.add(missing)
    assert {"CLOISTER_FEDERATION", "CLOISTER_RUNS"} <= needed or side == "client"
    assert {"CLOISTER_KIT", "CLOISTER_DATA"} <= needed or side == "coordinator"


def test_the_images_hold_no_compiler_no_key_and_no_root(engine, images):
    look = "command -v gcc cc g++ make ld; id -u; find / -xdev -name '*.key' -o -xdev -name '.env' 2>/dev/null"
    for image in images.values():
        seen = run("docker", "run", "--rm", "--network", "none", image, "sh", "-c", look, env=engine, check=False)
        assert seen.stdout.split() == [str(USER)], (image, seen.stdout)
    for image in ("coordinator", "supernode", "proxy"):
        torch = f"cloister/{image}:test"
        asked = run("docker", "run", "--rm", torch, "python3", "-c", "import torch", env=engine, check=False)
        assert asked.returncode != 0


def test_three_rounds_on_real_records_end_with_an_adapter_and_a_certificate_that_verifies(deployment, finished):
    certificate = deployment.certificate(finished)
    adapter = deployment.coordinator.inside("superexec", "stat", "-c", "%s", f"/state/runs/{finished}/adapter.npz")
    assert int(adapter.stdout) > 1000
    assert deployment.show(finished)["round"] == 3
    text = json.dumps(certificate)
    assert all(name in text for name in SILOS)
    for name in SILOS:
        # The trainer charges the envelope, the coordinator the rounds: the guarantee is never below what was reserved.
        spent = deployment.spent(name)
        assert deployment.show(finished)["epsilon"][name] <= spent["epsilon"] + 1e-6 <= spent["target_epsilon"]


def test_the_evaluator_scores_the_adapter_on_a_public_set_without_a_network(deployment, finished):
    public = deployment.folder / "public"
    public.mkdir()
    write_records(public / "public.jsonl", "NIHSeniorHealth")
    overlay = ROOT / "deploy" / "coordinator" / "compose.evaluator.yaml"
    own = {"CLOISTER_BACKBONE": str(deployment.folder / "clinic-a" / "backbone"), "CLOISTER_PUBLIC_DATA": str(public)}
    project = Project(deployment.coordinator.name, "coordinator", deployment.coordinator.environment | own, overlay)
    start = ("run", "--rm", "-T", "--no-deps", "evaluator", "cloister")
    built = ("adapter", "build", f"/runs/runs/{finished}", "--model", "/backbone", "--output", "/state/adapter")
    assert "3 rounds" in project(*start, *built).stdout
    columns = ("--prompt-column", "question", "--completion-column", "answer", "--json")
    data = ("--eval-data", "/public/public.jsonl", "--model", "/backbone")
    scored = json.loads(project(*start, "evaluate", "--adapter", "/state/adapter", *data, *columns).stdout)
    assert 0 < scored["score"] < 1
    assert scored["count"] > RECORDS


def test_a_stranger_in_the_outer_network_reaches_the_proxy_and_nothing_behind_it(deployment, finished, engine, images):
    script = """
import socket, ssl, sys, urllib.error, urllib.request
context = ssl._create_unverified_context()
def ask(path, **headers):
    request = urllib.request.Request("https://proxy:8443/" + path, b"", headers=headers, method="POST")
    urllib.request.urlopen(request, context=context)
for path in ("v1/control/list-runs", "v1/control/start-run", "v1/runtime/acquire-task", "health", ""):
    try:
        ask(path)
        print("open", path)
    except urllib.error.HTTPError as error:
        print(error.code)
try:
    ask("v1/fleet/pull-messages", **{"Content-Type": "application/protobuf"})
    print("open fleet")
except urllib.error.HTTPError as error:
    print("fleet", error.code)
for host, port in [line.split() for line in sys.stdin]:
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        print("reached", host, port)
    except OSError:
        print("unreachable")
"""
    behind = [("superlink", "8000"), ("accountant", "9443"), ("superexec", "9000"), ("proxy", "8080")]
    addresses = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
    for service, port in (("superlink", "8000"), ("accountant", "9443")):
        container = deployment.coordinator.container(service)
        found = run("docker", "inspect", "--format", addresses, container, env=engine).stdout.split()
        behind += [(address, port) for address in found]
    network = f"{deployment.coordinator.name}_outside"
    seen = run(
        "docker", "run", "--rm", "--interactive", "--network", network, images["CLOISTER_SUPERNODE_IMAGE"], "python3",
        "-c", script, env=engine, text="".join(f"{host} {port}\n" for host, port in behind),
    ).stdout.splitlines()  # fmt: skip
    assert seen[:5] == ["404"] * 5
    assert seen[5] == "fleet 401"
    assert seen[6:] == ["unreachable"] * len(behind)


def test_code_beside_the_relay_finds_no_record_no_ledger_and_no_signing_key(deployment, finished):
    """What a bundle that the coordinator ships could look at, with the relay's own rights."""
    wanted = ("records.jsonl", "ledger.sqlite*", "client.key", "client-tls.key", "status.sock", "policy.toml")
    names = " -o ".join(f"-name '{name}'" for name in wanted)
    for client in deployment.clients.values():
        look = client.inside("supernode", "sh", "-c", f"find / \\( {names} \\) -not -path '/proc/*' 2>/dev/null; true")
        assert look.stdout == ""
        inside = client.inside("trainer", "sh", "-c", "ls /data /state; touch /data/x /etc/x 2>&1; true").stdout
        assert "records.jsonl" in inside
        assert "ledger.sqlite" in inside
        assert inside.count("Read-only file system") == 2
        network = client.inside("trainer", "sh", "-c", "cat /proc/net/dev | grep -c : ; cat /proc/net/route | wc -l")
        assert network.stdout.split() == ["1", "1"]  # loopback, and no route


def test_a_hostile_bundle_runs_beside_the_relay_and_brings_nothing_home(deployment, finished):
    """Code of the coordinator's choice, shipped by Flower, run by the SuperNode as it would run the relay."""
    script = (Path(__file__).parent / "hostile_bundle.py").read_text()
    said = deployment.coordinator.inside("superexec", "python3", "-", text=script, limit_s=400).stdout
    reports = [json.loads(line.split("HOSTILE ", 1)[1]) for line in said.splitlines() if "HOSTILE {" in line]
    assert len(reports) == len(SILOS), said[-3000:]
    for report in reports:
        assert report["files"] == report["others"] == report["written"] == []
        assert report["sockets"] == ["trainer.sock"]
        for method in ("Status", "Budget", "Read"):
            answers = {answer for asked, answer in report["answers"] if asked == method}
            assert answers == {"StatusCode.UNIMPLEMENTED"}
        for method, answer in report["answers"]:
            # Public facts, and the few bytes of a status: an adapter or a record would be larger.
            assert method == "Describe" or not answer.isdigit() or int(answer) < 64, (method, answer)
    for name in SILOS:
        rows = (deployment.folder / name / "data" / "records.jsonl").read_text().splitlines()
        assert not any(json.loads(row)["question"] in said for row in rows)


def test_three_faults_in_one_run_and_epsilon_stays_right_on_both_sides(deployment, finished, engine):
    """The SuperLink is killed, a trainer is killed, an organisation's network is cut for 20 s."""
    run_id = deployment.submit(6, 1)
    east, west = deployment.clients.values()
    deployment.wait(run_id, lambda found: found["round"] >= 1, 300)
    deployment.coordinator.kill("superlink")
    deployment.wait(run_id, lambda found: found["round"] >= 2 or found["state"] == "failed", 400)
    west.kill("trainer")
    time.sleep(3)
    network, node = f"{deployment.coordinator.name}_outside", east.container("supernode")
    run("docker", "network", "disconnect", network, node, env=engine)
    time.sleep(20)
    run("docker", "network", "connect", network, node, env=engine)
    for _ in range(3):
        found = deployment.wait(run_id, lambda found: found["state"] not in ("waiting", "training", "certifying"), 600)
        if found["state"] == "finished":
            break
        deployment.command("runs", "resume", run_id)
    assert deployment.show(run_id)["state"] == "finished"
    deployment.certificate(run_id)
    for name in SILOS:
        assert deployment.show(run_id)["epsilon"][name] <= deployment.spent(name)["epsilon"] + 1e-6


def test_a_revoked_organisation_is_out_within_seconds_and_nothing_is_restarted(deployment, finished, engine):
    """Runs last: the organisation's node ends for good."""
    started = "{{.State.StartedAt}}"
    services = ("proxy", "superlink", "superexec", "accountant", "nodes")
    before = [
        run("docker", "inspect", "--format", started, deployment.coordinator.container(one), env=engine).stdout
        for one in services
    ]
    since = datetime.now(UTC).isoformat()
    deployment.federation.revoke("clinic-b")
    deadline = time.monotonic() + 60
    while "clinic-b.1: unregistered" not in deployment.coordinator("logs", "--since", since, "nodes").stdout:
        assert time.monotonic() < deadline
        time.sleep(1)
    refused = deployment.clients["clinic-b"]
    while "nauthori" not in refused("logs", "--since", since, "supernode").stdout:
        assert time.monotonic() < deadline + 60, refused("logs", "--tail", "20", "supernode").stdout
        time.sleep(1)
    after = [
        run("docker", "inspect", "--format", started, deployment.coordinator.container(one), env=engine).stdout
        for one in services
    ]
    assert before == after
