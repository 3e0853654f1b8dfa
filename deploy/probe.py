"""Is a service well? For container engines: ``python -m deploy.probe KIND ADDRESS [FILES]``; exit code 0 says yes.

url      https://127.0.0.1:8000/health ca.crt     answers 200
grpc     127.0.0.1:9000                           gRPC health says SERVING, in plain text
grpcs    127.0.0.1:9443 ca.crt tls.crt tls.key    the same with mutual TLS
grpc     unix:/run/cloister/trainer.sock          the same on a socket
socket   /run/cloister/dashboard.sock /healthz    answers 200 on a Unix socket
file     /tmp/looked                              was touched within the last minute
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT_S = 8.0
FRESH_S = 60.0


def url(address: str, authority: str | None = None) -> None:
    """Raises OSError unless ``address`` answers 200."""
    context = None if authority is None else ssl.create_default_context(cafile=authority)
    with urllib.request.urlopen(address, timeout=TIMEOUT_S, context=context):  # noqa: S310 - of our own compose file
        pass


def unix_socket(path: str, target: str) -> None:
    """Raises OSError unless the server on a Unix socket answers 200 to ``target``."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(TIMEOUT_S)
        stream.connect(path)
        stream.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        line = stream.makefile("rb").readline(256).split()
    if line[1:2] != [b"200"]:
        raise OSError(f"{target}: answered {b' '.join(line[1:]).decode('ascii', 'replace') or 'nothing'}")


def grpc_health(address: str, authority: str = "", certificate: str = "", key: str = "") -> None:
    """Raises unless gRPC's health service says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if authority:
        files = [Path(name).read_bytes() for name in (authority, key, certificate)]
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))
    else:
        channel = grpc.insecure_channel(address)
    with channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise OSError(f"{address}: not serving")


def file(path: str) -> None:
    """Raises unless ``path`` was touched lately."""
    age = time.time() - Path(path).stat().st_mtime
    if age > FRESH_S:
        raise OSError(f"{path}: last touched {age:.0f} s ago")


KINDS: dict[str, Callable[..., None]] = {
    "url": url,
    "socket": unix_socket,
    "grpc": grpc_health,
    "grpcs": grpc_health,
    "file": file,
}


def main(arguments: Sequence[str]) -> int:
    """0 when the service is well, 1 when it is not, 2 when the question is none."""
    if len(arguments) < 2 or arguments[0] not in KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        KINDS[arguments[0]](*arguments[1:])
    except Exception as error:
        print(f"{arguments[1]}: {error}"[:500], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
