"""What the compose files and the Dockerfile promise, read without an engine; tests/deployment runs them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from deploy.cli import app
from deploy.commands.coordinator import superlink_command
from deploy.probe import KINDS
from deploy.provisioning.database import READER, WRITER

DEPLOY = Path(__file__).parents[2] / "deploy"
SIDES = {
    "coordinator": ("compose.postgres.yaml", "compose.evaluator.yaml", "compose.gpu.yaml"),
    "client": ("compose.gpu.yaml",),
}
FILES = [DEPLOY / side / name for side, overlays in SIDES.items() for name in ("compose.yaml", *overlays)]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


COORDINATOR = read(DEPLOY / "coordinator" / "compose.yaml")["services"]
CLIENT = read(DEPLOY / "client" / "compose.yaml")["services"]
EVALUATOR = read(DEPLOY / "coordinator" / "compose.evaluator.yaml")["services"]
POSTGRES = read(DEPLOY / "coordinator" / "compose.postgres.yaml")["services"]
OURS = {f"coordinator/{name}": service for name, service in COORDINATOR.items()}
OURS |= {f"client/{name}": service for name, service in CLIENT.items()}


def mounts(service: dict) -> dict[str, dict]:
    """Target to mount; the short form is a named volume."""
    found = {}
    for mount in service.get("volumes", []):
        if isinstance(mount, str):
            source, target, *options = mount.split(":")
            found[target] = {"type": "volume", "source": source, "read_only": "ro" in options}
        else:
            found[mount["target"]] = mount
    return found


def command(service: dict) -> list[str]:
    words = service["command"]
    if words[:2] == ["sh", "-c"]:
        words = words[2].partition("exec ")[2].split()
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


@pytest.mark.parametrize("name", OURS)
def test_every_service_is_locked_down_and_watched(name):
    service = OURS[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["pids_limit"] > 0
    assert "privileged" not in service
    assert "user" not in service  # the image's own, which is not root
    kind, *rest = service["healthcheck"]["test"][4:]
    assert service["healthcheck"]["test"][:4] == ["CMD", "python3", "-m", "deploy.probe"]
    assert kind in KINDS
    assert rest


def test_only_the_proxy_is_reached_from_outside_and_only_the_inner_network_reaches_control():
    networks = read(DEPLOY / "coordinator" / "compose.yaml")["networks"]
    assert {name for name, service in COORDINATOR.items() if "ports" in service} == {"proxy"}
    assert {name for name, net in networks.items() if not (net or {}).get("internal")} == {"outside"}
    attached = {net: {name for name, one in COORDINATOR.items() if net in one["networks"]} for net in networks}
    assert attached == {
        "outside": {"proxy"},
        "fleet": {"proxy", "superlink"},
        "inner": {"superlink", "superexec", "accountant", "nodes"},
        "alone": {"dashboard"},
    }


def test_the_dashboard_writes_nothing_but_its_socket_and_holds_no_key():
    given = mounts(COORDINATOR["dashboard"])
    assert {target for target, mount in given.items() if not mount.get("read_only")} == {"/run/cloister"}
    assert set(given) == {"/state", "/accountant", "/run/cloister", "/etc/cloister/dashboard"}
    others = {
        name for name, one in COORDINATOR.items() if mounts(one).get("/run/cloister", {}).get("source") == "dashboard"
    }
    assert others == {"dashboard", "proxy"}  # whoever opens the socket says who asks
    assert mounts(COORDINATOR["proxy"])["/run/cloister"]["read_only"]
    assert "--token-file" not in command(COORDINATOR["dashboard"])
    assert "--proxy-socket" in command(COORDINATOR["dashboard"])


def test_the_dashboard_is_given_a_password_that_only_reads():
    """The server forbids its role everything else: ``tests/ledger/test_reader_role.py``."""
    overlay = read(DEPLOY / "coordinator" / "compose.postgres.yaml")
    services = overlay["services"]
    assert services["dashboard"]["secrets"] == ["postgres-reader-password"]
    assert {name for name, one in services.items() if "postgres-password" in one["secrets"]} == {
        "accountant",
        "postgres",
    }
    dashboard, accountant = (services[name]["command"][2] for name in ("dashboard", "accountant"))
    (role,) = re.findall(r"--ledger postgresql\+psycopg://(\w+)@postgres/cloister", dashboard)
    assert re.findall(r"cloister ledger reader (\S+)\s+--role (\S+)", accountant) == [
        ("postgresql+psycopg://cloister@postgres/cloister", role)
    ]
    assert role != services["postgres"]["environment"]["POSTGRES_USER"]
    files = {name: secret["file"].rpartition("/")[2].rstrip("}") for name, secret in overlay["secrets"].items()}
    assert files == {"postgres-password": WRITER, "postgres-reader-password": READER}


def test_every_service_is_given_its_own_folder_of_the_federation_and_no_other():
    for name, service in COORDINATOR.items():
        bound = {target: mount for target, mount in mounts(service).items() if mount["type"] == "bind"}
        assert all(mount["read_only"] and not mount["bind"]["create_host_path"] for mount in bound.values())
        federation = [mount["source"] for mount in bound.values() if "CLOISTER_FEDERATION" in mount["source"]]
        assert [source.rpartition("/")[2] for source in federation] == [name]
    assert set(mounts(COORDINATOR["superexec"])) == {"/state", "/etc/cloister/superexec", "/etc/cloister/runs"}


def test_records_are_given_to_the_trainer_alone_which_has_no_network():
    trainer, node = mounts(CLIENT["trainer"]), mounts(CLIENT["supernode"])
    assert CLIENT["trainer"]["network_mode"] == "none"
    assert "networks" not in CLIENT["trainer"]
    assert "ports" not in CLIENT["trainer"]
    assert trainer["/data"]["read_only"]
    writable = {target for target, mount in trainer.items() if not mount.get("read_only")}
    assert writable == {"/state", "/run/cloister"}
    # Code that a coordinator ships can call the trainer, and put nothing in the place of its socket.
    assert all(mount["read_only"] for mount in node.values())
    assert set(node) == {
        "/run/cloister",
        "/etc/cloister/kit/ca.crt",
        "/etc/cloister/kit/kit.json",
        "/etc/cloister/kit/supernode.key",
    }
    assert EVALUATOR["evaluator"]["network_mode"] == "none"
    assert not any("CLOISTER_DATA" in str(mount) for mount in EVALUATOR["evaluator"]["volumes"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_variable_has_a_default_or_stops_with_its_cause_and_is_in_the_example(path):
    example = (path.parent / ".env.example").read_text()
    text = re.sub(r"(?m)^\s*#.*$", "", path.read_text())
    for name, rest in re.findall(r"(?<!\$)\$\{(\w+)(.*?)\}", text):
        if rest.startswith(":?"):
            assert len(rest) > 20, name
            assert re.search(rf"(?m)^#?{name}=", example), name
        else:
            assert rest.startswith(":-"), name
    assert not re.search(r"(?<!\$)\$[A-Za-z_]", text)


def test_without_its_values_compose_stops_and_names_one(tmp_path):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed (it needs no engine for this)")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    if "DOCKER_CONFIG" in os.environ:
        environment["DOCKER_CONFIG"] = os.environ["DOCKER_CONFIG"]
    for side, overlays in SIDES.items():
        for count in range(len(overlays) + 1):
            files = ["compose.yaml", *overlays[:count]]
            options = [part for name in files for part in ("--file", str(DEPLOY / side / name))]
            asked = subprocess.run(
                [docker, "compose", "--env-file", "/dev/null", *options, "config", "--quiet"],
                capture_output=True,
                text=True,
                env=environment,
            )
            assert asked.returncode != 0
            assert re.search(r"variable (CLOISTER|POSTGRES)_\w+ is missing a value: \S", asked.stderr), asked.stderr


def test_flower_takes_every_flag():
    """A newer Flower that renames one breaks here and not in the field."""
    words = command(COORDINATOR["superlink"])
    assert words[0] == "flower-superlink"
    ours = _parse_args_run_superlink().parse_args(words[1:])
    assert ours.enable_supernode_auth
    assert ours.isolation == "process"
    assert not ours.insecure
    # The plain processes of `cloister coordinator serve` are started with the same switches.
    plain = superlink_command(Path("/state"), "0.0.0.0", 8000, [Path("c"), Path("k"), Path("a")], Path("s"))
    assert {word for word in plain if word.startswith("--")} == {word for word in words if word.startswith("--")}
    words = command(COORDINATOR["superexec"])
    assert words[0] == "flower-superexec"
    assert superexec_parser().parse_args(words[1:]).runtime_api_address == "superlink:8000"


@pytest.mark.parametrize(
    "words",
    [
        *(command(one) for one in (*OURS.values(), *EVALUATOR.values()) if one.get("command", [""])[0] == "cloister"),
        *(command(POSTGRES[name]) for name in ("accountant", "dashboard")),
    ],
    ids=" ".join,
)
def test_our_own_commands_take_every_option(words):
    found = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(found, "commands"):
        found, rest = found.commands[rest[0]], rest[1:]
    if rest != ["--help"]:
        found.make_context(words[0], rest).close()


def test_images_start_from_the_one_base_hold_no_compiler_and_run_as_nobody_in_particular():
    text = (DEPLOY / "Dockerfile").read_text()
    assert not text.startswith("# syntax")
    stages = re.split(r"(?m)^FROM ", text)[1:]
    names = {}
    for stage in stages:
        source, name = re.match(r"(\S+) AS (\S+)", stage).groups()
        assert source in {"python:3.11-slim-bookworm", *names}, source
        names[name] = stage
    for name in ("coordinator", "supernode", "trainer", "proxy"):
        stage = names[name]
        if "USER" not in stage:
            stage = names[stage.split()[0]]
        assert "USER 10001:10001" in stage
        assert "pip install" not in stage
    assert not re.search(r"\b(gcc|g\+\+|build-essential|curl|wget)\b", text)
    used = {one["build"]["target"] for one in OURS.values() if "build" in one}
    assert used == {"proxy", "coordinator", "trainer", "supernode"}


def test_the_context_of_the_build_lists_what_goes_in():
    lines = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:].removesuffix("/**") for line in lines if line.startswith("!")}
    assert let_in == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints-cpu.txt",
        "common",
        "client",
        "server",
        "deploy",
    }
    assert {"**/*.key", "**/.env", "**/*.sqlite*"} <= set(lines)


def test_where_no_engine_can_run_the_script_says_so_in_one_line(tmp_path):
    script = Path(__file__).parents[1] / "deployment" / "engine.sh"
    options = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    text = script.read_text()  # the checkout may be closed to other users: the shell reads it from its input
    asked = subprocess.run(
        ["sh", "-s", "up", "/nowhere"], input=text, capture_output=True, text=True, cwd="/", **options
    )
    assert asked.returncode == 3
    assert asked.stderr.splitlines() == ["no container engine can run here: starting one needs root"]
    assert asked.stdout == ""
