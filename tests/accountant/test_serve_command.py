"""``cloister accountant serve`` as a process: started, asked, ended, started again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.errors import InvalidInput, LedgerCorrupt
from common.privacy import SampledGaussian
from deploy.commands.accountant import accountant_app, tls_files
from server.accountant import Ask, Outcome
from server.remote_accountant import RemoteAccountant

ROOT = Path(__file__).parents[2]
EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)
PROGRAM = "import sys; from deploy.commands.accountant import accountant_app; accountant_app(sys.argv[1:])"


def start(folder):
    arguments = ["serve", "--insecure", "--ledger", folder / "l.sqlite", "--key", folder / "key", "--address"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, arguments), f"unix:{folder}/socket"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    first, second = process.stdout.readline(), process.stdout.readline()
    assert first.startswith("accountant "), first
    process.stdout.close()
    return process, second.removeprefix("public key ").strip()


def test_the_service_survives_its_end_and_keeps_its_key_and_its_book(tmp_path, registration):
    process, key = start(tmp_path)
    try:
        with RemoteAccountant(f"unix:{tmp_path}/socket", public_key=key) as remote:
            remote.register("run", {"a": registration()})
            (signed,) = remote.reserve("run", 1, [Ask("a", EVENT)]).granted
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, again = start(tmp_path)
            assert again == key
            assert remote.reserve("run", 1, [Ask("a", EVENT)]).granted == (signed,)
            remote.commit("run", {signed.reservation.reservation_id: Outcome.UNKNOWN})
            assert remote.spent("run", "a").events == (EVENT,)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def test_plain_text_must_be_asked_for_and_excludes_certificates(tmp_path):
    with pytest.raises(InvalidInput, match="--insecure"):
        tls_files(None, None, None, insecure=False)
    with pytest.raises(InvalidInput, match="--insecure"):
        tls_files(tmp_path, tmp_path, None, insecure=False)
    with pytest.raises(InvalidInput, match="exclude"):
        tls_files(tmp_path, None, None, insecure=True)
    assert tls_files(None, None, None, insecure=True) is None
    assert tls_files(tmp_path, tmp_path, tmp_path, insecure=False).authority == tmp_path
    app = typer.Typer()
    app.add_typer(accountant_app)
    options = ["--ledger", str(tmp_path / "l.sqlite"), "--key", str(tmp_path / "k")]
    public = ["--insecure", "--address", "0.0.0.0:0"]
    assert isinstance(CliRunner().invoke(app, ["accountant", "serve", *options]).exception, InvalidInput)
    old = ["accountant", "serve", *options, "--insecure", "--anchor", "f" * 64]
    assert isinstance(CliRunner().invoke(app, old).exception, LedgerCorrupt)
    assert isinstance(CliRunner().invoke(app, ["accountant", "serve", *options, *public]).exception, InvalidInput)
