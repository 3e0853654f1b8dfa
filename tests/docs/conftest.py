"""A warm ``cloister``, one tiny run that the pages share, and a sandbox per page."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from blocks import ROOT, Block
from sandbox import Sandbox, records
from warm import install


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """A folder for the path, in which ``cloister`` is quick to start."""
    folder = tmp_path_factory.mktemp("bin")
    place = Path(tempfile.mkdtemp(prefix="cl-"))  # a socket's path is short
    address = place / "warm.sock"
    log = folder / "warm.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("warm.py")), str(address)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    ready, _, _ = select.select([process.stdout], [], [], 1200)
    assert ready, log.read_text()
    assert process.stdout.readline() == b"ready\n", log.read_text()
    install(folder, address)
    yield folder
    process.stdin.close()
    process.wait(30)
    process.stdout.close()
    shutil.rmtree(place)


@pytest.fixture
def sandbox(commands):
    """sandbox() -> an empty one; its services end with the test."""
    opened = []

    def make() -> Sandbox:
        opened.append(Sandbox(Path(tempfile.mkdtemp(prefix="cl-")), commands))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
        shutil.rmtree(one.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(commands):
    """The folder of a finished run of two hospitals and two rounds, made by the command itself."""
    one = Sandbox(Path(tempfile.mkdtemp(prefix="cl-")), commands)
    one.write("records.jsonl", records(60))
    one.play(
        Block(
            "first run", 1, "sh",
            "cloister simulate --data records.jsonl --silo-column hospital --prompt-column question "
            "--completion-column answer --holdout 0.1 --rounds 2 --output runs/001",
        )
    )  # fmt: skip
    yield one.folder / "runs" / "001"
    shutil.rmtree(one.folder, ignore_errors=True)
