"""A coordinator and two organisations as containers, from three compose projects, on real records.

`make test-deployment`. The engine comes from engine.sh unless one answers already; where none can run, these tests say
so in one line and tests/provision/test_compose.py has still checked the compose files.
"""

import json
import re
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from containers import (
    DATA,
    ENGINE,
    IMAGES,
    RECORDS,
    ROOT,
    SILOS,
    USER,
    Deployment,
    Project,
    local_wheels,
    run,
    write_records,
)

pytestmark = [pytest.mark.slow, pytest.mark.containers, pytest.mark.data, pytest.mark.timeout(1500)]


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


@pytest.fixture(scope="module")
def images(engine):
    """All four, built one after the other from this tree."""
    with local_wheels(engine) as arguments:
        for target in IMAGES:
            options = ["--file", ROOT / "deploy" / "Dockerfile", "--target", target, "--tag", f"cloister/{target}:test"]
            run("docker", "buildx", "build", "--load", *options, *arguments, ROOT, env=engine, limit_s=1200)
    return {f"CLOISTER_{name.upper()}_IMAGE": f"cloister/{name}:test" for name in IMAGES}


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
