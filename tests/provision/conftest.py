"""A federation folder, and a real SuperLink that believes in it."""

import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.provisioning.provision import Federation, init

NOW = datetime.now(UTC).replace(microsecond=0)
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def now():
    return NOW


@pytest.fixture
def federation(tmp_path) -> Federation:
    init(tmp_path / "federation", "127.0.0.1:8443", NOW)
    return Federation(tmp_path / "federation")


@pytest.fixture(scope="module")
def lasting_federation(tmp_path_factory) -> Federation:
    """One for a whole file: a SuperLink takes seconds to start."""
    folder = tmp_path_factory.mktemp("lasting") / "federation"
    init(folder, "127.0.0.1:8443", NOW)
    return Federation(folder)


@pytest.fixture(scope="module")
def superlink(lasting_federation, tmp_path_factory):
    """``host:port`` of a SuperLink with node authentication, started from the federation's files."""
    port, side = free_port(), lasting_federation.folder / "coordinator" / "superlink"
    folder = tmp_path_factory.mktemp("superlink")
    command = [Path(sys.executable).parent / "flower-superlink", "--host", "127.0.0.1", "--port", port]
    command += ["--ssl-certfile", side / "tls.crt", "--ssl-keyfile", side / "tls.key"]
    command += ["--ssl-ca-certfile", side / "ca.crt", "--enable-supernode-auth", "--isolation", "process"]
    command += ["--superexec-auth-secret-file", side / "superexec.secret", "--database", folder / "superlink.db"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env={**os.environ, **OFFLINE, "FLWR_HOME": folder}
        )
        try:
            _wait_until_healthy(process, port, side / "ca.crt", folder / "log")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_healthy(process, port, authority, log):
    context = ssl.create_default_context(cafile=str(authority))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"the SuperLink did not come up:\n{log.read_text()[-2000:]}")
