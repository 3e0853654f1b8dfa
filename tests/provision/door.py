"""nginx as the coordinator's door, started as a plain process from the deployment's own configuration."""

import http.client
import os
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from deploy.running.doctor import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "coordinator" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


class Proxy:
    """nginx with the deployment's own configuration, its addresses and files put elsewhere."""

    def __init__(self, folder: Path, side: Path, upstream: str, *, port: int | None = None) -> None:
        self.port, health, self.authority = port or free_port(), free_port(), side / "proxy" / "ca.crt"
        text = CONFIGURATION.read_text()
        for there, here in (
            (" /tmp/", f" {folder}/"),  # before any other path of the test comes in
            ("listen 8443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("127.0.0.1:8080", f"127.0.0.1:{health}"),
            ("/etc/cloister/proxy", str(side / "proxy")),
            ("superlink:8000", upstream),
            ("resolver 127.0.0.11 valid=5s ipv6=off;", ""),
            ("/dev/stderr", f"{folder}/error.log"),
        ):
            assert there in text, there
            text = text.replace(there, here)
        if os.geteuid() == 0:
            text = "user root;\n" + text  # its workers must be able to read the test's folder
        (folder / "nginx.conf").write_text(text)
        subprocess.run([NGINX, "-t", "-q", "-c", str(folder / "nginx.conf")], check=True)
        command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        pytest.fail("nginx did not come up")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.authority))
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)

    def ask(self, path: str, *, method: str = "POST", body: bytes = b"", headers=None) -> int:
        connection = self.connect()
        try:
            connection.putrequest(method, path, skip_host=path.startswith("http:"), skip_accept_encoding=True)
            if path.startswith("http:"):
                connection.putheader("Host", "superlink")
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            return connection.getresponse().status
        finally:
            connection.close()

    def raw(self, line: bytes) -> bytes:
        """The status line that an odd request line gets."""
        context = ssl.create_default_context(cafile=str(self.authority))
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
        ):
            stream.sendall(line + b"\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return stream.recv(4096).split(b"\r\n")[0]
