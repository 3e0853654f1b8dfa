"""Flower's Control API as the coordinator's operator uses it: start, stop and read runs.

The API has no authentication of its own: it is reached on loopback or on the coordinator's internal network only.
What is submitted is a bundle that holds no code: it names the apps that are installed with Cloister on both sides, so
that every organisation runs the code it has audited.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import httpx

from common.errors import InvalidInput, Refused, Unavailable

BUNDLE = """\
[project]
name = "cloister"
version = "{version}"
description = "Names the apps that are installed with Cloister; holds no code."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "cloister"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.relay:app"

[tool.flwr.app.config]
run = ""
"""
README = "The apps named in pyproject.toml are those of the installed package `cloister`; this bundle holds no code.\n"


@dataclass(frozen=True)
class FlowerRun:
    """Flower's own view of a run: ``status`` is ``pending``, ``starting``, ``running`` or ``finished``."""

    run_id: int
    status: str
    sub_status: str
    details: str

    @property
    def is_over(self) -> bool:
        """Whether no ServerApp works on it any more."""
        return self.status == "finished"


class FlowerControl:
    """A connection to a SuperLink's Control API.

    Args:
        address: ``host:port`` of the SuperLink. authority: PEM file of the TLS authority; None for plain HTTP.
    """

    def __init__(self, address: str, authority: Path | None = None) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self.address = address
        try:
            certificates = None if authority is None else authority.read_bytes()
            self._client = ControlHttpClient.from_server_address(
                server_address=address,
                insecure=authority is None,
                root_certificates=certificates,
                interceptors=[RuntimeVersionHttpInterceptor(component_name="cloister")],
            )
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{authority}: not a readable TLS authority ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def start(self, run_id: str) -> int:
        """Submit the bundle for one of our runs; returns Flower's number for it.

        Raises:
            Unavailable: the SuperLink does not answer. Refused: it does not take the run.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content, digest = build_bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(digest, content, {})), override_config=user_config_to_proto({"run": run_id})
        )
        with self._asking():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise Refused(f"{self.address}: the SuperLink did not take the run: {answer.note}")
        return int(answer.run_id)

    def stop(self, flower_run: int) -> bool:
        """Have the SuperLink end its task now; False when it had ended already."""
        from flwr.proto.control_pb2 import StopRunRequest

        try:
            with self._asking():
                return bool(self._client.StopRun(StopRunRequest(run_id=flower_run)).success)
        except Refused:
            return False

    def show(self, flower_run: int) -> FlowerRun | None:
        """The SuperLink's word on one run; None when it does not know it (any more)."""
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            with self._asking():
                found = self._client.ListRuns(ListRunsRequest(run_id=flower_run)).run_dict
        except Refused:
            return None
        if flower_run not in found:
            return None
        status = found[flower_run].status
        return FlowerRun(flower_run, status.status or "pending", status.sub_status, status.details)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise Refused(f"{self.address}: {_reason(error.response)}") from error
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{self.address}: the SuperLink does not answer ({error or type(error).__name__}); "
                "is 'cloister coordinator serve' running?"
            ) from error
        except ValueError as error:
            raise Unavailable(
                f"{self.address}: what answers there is no SuperLink of this version ({error})"
            ) from error


def build_bundle() -> tuple[bytes, str]:
    """The bundle and its SHA-256."""
    from flwr.cli.build import build_fab_from_files

    own = BUNDLE.format(version=version("cloister")).encode()
    content, _ = build_fab_from_files({"pyproject.toml": own, "README.md": README.encode()})
    return content, hashlib.sha256(content).hexdigest()


def _reason(response: httpx.Response) -> str:
    """The SuperLink's own words, on one line."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        for name in ("public_details", "message", "detail"):
            if isinstance(body.get(name), str) and body[name]:
                return str(body[name])
    return f"HTTP {response.status_code}"
