"""The bundle that Flower ships to every client holds code of the named rooms and nothing else."""

import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parent.parent
FLOWERS_OWN = {".info/CONTENT", ".info/CONTENT.jsonl"}
PLANTED = (
    "data.jsonl",
    ".env",
    "common/.env",
    "common/settings.yaml",
    "server/records.jsonl",
    "server/state/ledger.sqlite",
    "client/records.py.jsonl",
    "client/guard_key.py",
    "deploy/secret.py",
    "client/data/patients.csv",
)
SECRET = "the secret of patient 17"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("tree")
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout to know which files are tracked")
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder)))


def test_only_code_of_the_shared_rooms_and_the_relay_is_shipped(bundle):
    names = {name for name in bundle.namelist() if not name.startswith(".info/")}
    code = {name for name in names if name.endswith(".py")}
    assert {name for name in code if name.startswith("client/")} == {
        "client/__init__.py",
        "client/relay.py",
        "client/trainer_service.py",
    }
    assert {name.partition("/")[0] for name in code} == {"client", "common", "server"}
    rest = names - code
    assert "pyproject.toml" in rest
    assert rest <= {"pyproject.toml", "LICENSE", "README.md"}, rest


def test_what_the_apps_import_is_in_the_bundle(bundle):
    names = set(bundle.namelist())
    assert {"server/app.py", "server/rounds.py", "common/messages.py", "common/privacy/pld.py"} <= names


def test_planted_files_stay_out(bundle):
    names = set(bundle.namelist())
    assert not names & set(PLANTED)
    for name in names:
        assert SECRET.encode() not in bundle.read(name)


def test_nothing_in_the_bundle_ends_like_data(bundle):
    allowed = {".py", ".toml", ".md", ""}
    strange = {name for name in bundle.namelist() if Path(name).suffix not in allowed and not name.startswith(".info/")}
    assert not strange
