"""What a stranger on the coordinator's outer network finds, and code that a hostile coordinator ships to clients."""

import base64
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from containers import RECORDS, SILOS, USER, records, run

pytestmark = [pytest.mark.slow, pytest.mark.containers, pytest.mark.timeout(1500)]

HERE = Path(__file__).parent


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


UNKNOWN = """
import pathlib, sys, tempfile
import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import NodeAuthHttpInterceptor
from deploy.provisioning.provision import request_keys
folder = pathlib.Path(tempfile.mkdtemp()) / "own"
request_keys(folder, "stranger")
key = load_ssh_private_key((folder / "private" / "supernode.key").read_bytes(), None)
with FleetHttpClient.from_server_address(
    "proxy:8443", insecure=False, root_certificates=sys.stdin.read().encode(),
    interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
) as client:
    public = public_key_to_bytes(key.public_key())
    for call, request in (
        ("ActivateNode", fleet.ActivateNodeRequest(public_key=public, heartbeat_interval=30)),
        ("RegisterNode", fleet.RegisterNodeFleetRequest(public_key=public)),
        ("PullMessages", fleet.PullMessagesRequest(node=Node(node_id=1))),
        ("PullMessages", fleet.PullMessagesRequest()),
    ):
        try:
            print(call, "open", getattr(client, call)(request))
        except httpx.HTTPStatusError as error:
            print(call, error.response.status_code)
"""


def test_an_unknown_node_that_signs_with_a_key_of_its_own_gets_nothing(deployment, finished, engine, images):
    network = f"{deployment.coordinator.name}_outside"
    authority = (deployment.federation.folder / "kits" / "court" / "ca.crt").read_text()
    image = images["CLOISTER_SUPERNODE_IMAGE"]
    command = ("docker", "run", "--rm", "--interactive", "--network", network, image, "python3", "-c", UNKNOWN)
    seen = run(*command, env=engine, text=authority).stdout.splitlines()
    assert seen == ["ActivateNode 412", "RegisterNode 404", "PullMessages 401", "PullMessages 401"]


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


def private_words(deployment, name):
    """What only this organisation has: every question, every answer's beginning, its keys, its policy."""
    words = [row[part].strip()[:60] for row in records(SILOS[name]) for part in ("question", "answer")]
    plain = [word for word in words if json.dumps(word)[1:-1] == word]
    assert len(plain) > RECORDS
    policy = (deployment.folder / name / "settings" / "policy.toml").read_text().splitlines()
    return [word.encode() for word in (*plain, policy[2], *(key(deployment, name, part) for part in KEYS))]


KEYS = ("client", "client-tls")


def key(deployment, name, part):
    """The longest word of a private key's file."""
    return max((deployment.federation.folder / "kits" / name / f"{part}.key").read_text().split(), key=len)


def brought(report):
    """Everything that was read, as bytes by where from; an error's text counts as an answer."""
    found = {name: base64.b64decode(text) for name, text in (report["files"] | report["sockets"]).items()}
    for number, (method, kind, text) in enumerate(report["answers"]):
        found[f"{method} {number}"] = base64.b64decode(text) if kind == "answer" else text.encode()
    return found


def test_a_hostile_bundle_runs_beside_the_relay_and_brings_nothing_home(deployment, finished, engine):
    """Code of the coordinator's choice, shipped by Flower, run by the SuperNode as it would run the relay."""
    code, bundle = ((HERE / f"hostile_{part}.py").read_text() for part in ("client", "bundle"))
    command = ("exec", "-T", "--env", f"HOSTILE_CLIENT={code}", "superexec", "python3", "-")
    said = deployment.coordinator(*command, text=bundle, limit_s=400).stdout
    reports = [json.loads(line.removeprefix("FOUND ")) for line in said.splitlines() if line.startswith("FOUND ")]
    assert len(reports) == len(SILOS), said[-3000:]
    words = [word for name in SILOS for word in private_words(deployment, name)]
    for report in reports:
        assert report["user"] == USER
        assert report["written"] == report["risen"] == []
        mounted = {path for path in report["files"] if path.startswith(("/etc/cloister", "/data", "/state", "/run"))}
        assert mounted == {f"/etc/cloister/kit/{name}" for name in ("ca.crt", "kit.json", "supernode.key")}
        assert not any("root" in path.split("/") for path in report["files"] if path.startswith("/proc"))
        assert "/run/cloister/trainer.sock" in report["sockets"]
        assert not any("status" in name for name in report["sockets"])
        found = brought(report)
        assert len(found) > 100  # it did look
        assert [(where, word) for where, content in found.items() for word in words if word in content] == []
        kinds = {method.split("/")[1]: set() for method, _, _ in report["answers"]}
        for method, kind, text in report["answers"]:
            kinds[method.split("/")[1]].add(kind)
            # Public facts, and the few bytes of a status: an adapter or a record would be larger.
            assert kind != "answer" or method.endswith("/Describe") or len(base64.b64decode(text)) < 64, method
        assert all(kinds[name] == {"UNIMPLEMENTED"} for name in ("Status", "Progress", "Budget", "Read", "Records"))
        assert "answer" in kinds["Describe"]


@pytest.mark.parametrize("name", SILOS)
def test_the_hostile_code_finds_the_records_where_they_are(deployment, finished, name):
    """Second witness of the test above: the same look, in the one container that may see them, sees them."""
    code = (HERE / "hostile_client.py").read_text()
    report = json.loads(deployment.clients[name].inside("trainer", "python3", "-", text=code, limit_s=400).stdout)
    found = brought(report)
    missed = [w for w in private_words(deployment, name) if not any(w in content for content in found.values())]
    # A client's TLS key is for pages and the ledger; the trainer has no use for it.
    assert missed == [key(deployment, name, "client-tls").encode()]
    assert {"/data/records.jsonl", "/state/ledger.sqlite", "/etc/cloister/client.key"} <= set(report["files"])
    assert b"budget" in found["/state/status.sock"]
    assert {"/state/x", "/run/cloister/x"} <= set(report["written"])
    assert report["risen"] == []
