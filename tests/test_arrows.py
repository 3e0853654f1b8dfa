"""The import arrows between the rooms, read from the source files, and what a bare import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "client", "server", "deploy")
ALLOWED = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "deploy": {"common", "client", "server", "deploy"},
}
BY_ITSELF = {"numpy", "scipy", *sys.stdlib_module_names}
HEAVY = {"torch", "transformers", "peft", "opacus", "accelerate", "safetensors", "datasets"}
IN_DEPLOY = {
    "demo": set(),
    "planning": {"demo"},
    "provisioning": {"migrations"},
    "reporting": {"demo"},
    "running": {"demo", "reporting"},
    "simulation": {"demo", "reporting"},
    "commands": {"demo", "migrations", "planning", "provisioning", "reporting", "running", "simulation"},
}
"""The rooms of deploy, and which of its other rooms each may see; all see the files beside them (inputs, workshop)."""
UNFIT_NAMES = {"utils", "util", "helpers", "helper", "manager", "base", "misc"}


def sources(room: str) -> list[Path]:
    return sorted(file for file in (ROOT / room).rglob("*.py") if "_pb2" not in file.name)


def imported(file: Path) -> set[str]:
    """Dotted names of everything ``file`` imports, wherever in it the import stands."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return names


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


ALL = [file for room in ROOMS for file in sources(room)]


def test_there_are_files_to_look_at():
    assert {file.relative_to(ROOT).parts[0] for file in ALL} == set(ROOMS)
    assert len(ALL) > 50


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_rooms_its_own_may_see(file):
    room = file.relative_to(ROOT).parts[0]
    ours = tops(file) & {*ROOMS, "tests", "benchmarks"}
    assert ours <= ALLOWED[room], f"{room} must not import {sorted(ours - ALLOWED[room])}"
    assert file.stem not in UNFIT_NAMES


@pytest.mark.parametrize("room", IN_DEPLOY)
def test_a_room_of_deploy_imports_only_rooms_below_it(room):
    for file in sources(f"deploy/{room}"):
        seen = {name.split(".")[1] for name in imported(file) if name.startswith("deploy.")}
        ours = {name for name in seen if (ROOT / "deploy" / name).is_dir()} - {room}
        assert ours <= IN_DEPLOY[room], f"{file}: {sorted(ours - IN_DEPLOY[room])}"
    rooms = {path.parent.name for path in (ROOT / "deploy").glob("*/__init__.py")}
    assert rooms == {*IN_DEPLOY, "migrations"}


@pytest.mark.parametrize("file", sources("common/privacy"), ids=lambda file: file.name)
def test_privacy_mathematics_imports_numpy_scipy_and_itself_alone(file):
    strange = tops(file) - BY_ITSELF - {"common"}
    assert not strange
    ours = {name for name in imported(file) if name.partition(".")[0] == "common"}
    assert all(name == "common" or name.startswith("common.privacy") for name in ours), ours


@pytest.mark.parametrize("file", sources("server"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_server_never_imports_torch_or_what_brings_it(file):
    assert not tops(file) & HEAVY


def test_a_wrong_arrow_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "server" / "deep" / "new.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from client import guard\n    from ... import deploy\n    import torch.nn\n")
    assert {"client", "client.guard", "torch.nn", ".deploy"} <= imported(file)
    assert {"client", "torch"} <= tops(file)


# Flower starts the relay anew for every message, so what it imports is paid in every round.
FOR_ACCOUNTS = {"scipy", "sqlalchemy", "pydantic"}
# The package loads its accountants when they are named: here all of them are.
ROOMS_OF_PRIVACY = sorted(f"common.privacy.{file.stem}" for file in (ROOT / "common" / "privacy").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (", ".join(ROOMS_OF_PRIVACY), {"torch", "flwr", "grpc", "pydantic", "sqlalchemy", "cryptography"}),
        ("server.rounds", HEAVY),
        ("server.terms", HEAVY | {"flwr"}),
        ("client.relay", HEAVY | FOR_ACCOUNTS),
        ("client.trainer_service", HEAVY | FOR_ACCOUNTS),
    ],
    ids=["common.privacy", "server.rounds", "server.terms", "client.relay", "client.trainer_service"],
)
def test_a_bare_import_loads_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(sorted(set({sorted(absent)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_accounting_can_be_had_and_no_other():
    import common.privacy

    assert {name for name in common.privacy.__all__ if hasattr(common.privacy, name)} == set(common.privacy.__all__)
    assert not hasattr(common.privacy, "Nothing")
