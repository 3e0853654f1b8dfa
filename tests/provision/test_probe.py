"""``deploy/probe.py``: yes only from a service that is well."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.trainer_service import serve as serve_trainer
from common.ledger import Ledger
from common.signing import SigningKey
from deploy.probe import main
from server.accountant import EmbeddedAccountant
from server.accountant_service import Tls, serve

ROOT = Path(__file__).parents[2]


def test_the_superlink_is_asked_over_its_own_tls(lasting_federation, superlink, tmp_path, capsys):
    authority = str(lasting_federation.folder / "coordinator" / "superlink" / "ca.crt")
    assert main(["url", f"https://{superlink}/health", authority]) == 0
    assert main(["url", f"https://{superlink}/nothing", authority]) == 1
    assert "404" in capsys.readouterr().err
    assert main(["url", f"https://{superlink}/health"]) == 1  # an authority that nobody knows
    assert main(["url", "http://127.0.0.1:9/"]) == 1


def test_the_accountant_is_asked_with_its_own_certificate(federation, tmp_path):
    side = federation.folder / "coordinator" / "accountant"
    files = [str(side / name) for name in ("ca.crt", "tls.crt", "tls.key")]
    with Ledger(str(tmp_path / "l.sqlite")) as ledger:
        tls = Tls(side / "tls.crt", side / "tls.key", side / "ca.crt")
        server, address = serve(EmbeddedAccountant(ledger, SigningKey.generate()), "127.0.0.1:0", tls=tls)
        try:
            assert main(["grpcs", address, *files]) == 0
            assert main(["grpc", address]) == 1
        finally:
            server.stop(0).wait()


def test_plain_grpc_health(tmp_path):
    with Ledger(str(tmp_path / "l.sqlite")) as ledger:
        accountant = EmbeddedAccountant(ledger, SigningKey.generate())
        server, address = serve(accountant, f"unix:{tmp_path}/s", tls=None)
        try:
            assert main(["grpc", address]) == 0
        finally:
            server.stop(0).wait()


def test_a_trainer_is_asked_on_its_socket(tmp_path):
    address = f"unix:{tmp_path}/trainer.sock"
    assert main(["grpc", address]) == 1
    server = serve_trainer(None, address)
    try:
        assert main(["grpc", address]) == 0
    finally:
        server.stop(0).wait()


def test_a_file_must_be_fresh(tmp_path):
    path = tmp_path / "looked"
    assert main(["file", str(path)]) == 1
    path.touch()
    assert main(["file", str(path)]) == 0
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert main(["file", str(path)]) == 1


@pytest.mark.parametrize("words", [[], ["url"], ["nothing", "x"]])
def test_a_question_that_is_none_is_said_so(words, capsys):
    assert main(words) == 2
    assert "grpcs" in capsys.readouterr().err


def test_it_starts_without_our_other_packages(tmp_path):
    """The proxy's image has this one file."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "probe.py").write_bytes((ROOT / "deploy" / "probe.py").read_bytes())
    (tmp_path / "looked").touch()
    command = [sys.executable, "-S", "-m", "deploy.probe", "file", str(tmp_path / "looked")]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
