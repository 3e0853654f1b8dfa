"""Which SuperNodes may join: a folder of public keys, kept in step with a running SuperLink.

    nodes/NAME.pub           is registered with the SuperLink
    nodes/revoked/NAME.pub   is unregistered; Flower never takes that key again

Only what lies in ``revoked`` is struck off, so an empty or unmounted folder locks nobody out. The SuperLink's control
interface answers everybody who can reach it (Flower 1.41 checks no caller there): this runs on the coordinator's
inner network only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import InvalidInput, Unavailable
from deploy.provisioning.kits import node_key_pem
from deploy.provisioning.private_files import read_small

GONE = "unregistered"


@dataclass(frozen=True)
class Changed:
    """What one look at the folder led to.

    Attributes:
        registered, unregistered: names of kits.
        unknown: nodes that the SuperLink knows and the folder does not; they are left alone.
    """

    registered: tuple[str, ...] = ()
    unregistered: tuple[str, ...] = ()
    unknown: tuple[int, ...] = ()


def connect(superlink: str, root_certificates: Path) -> ControlHttpClient:
    """A client of the control interface at ``host:port``.

    Raises:
        InvalidInput: the certificate file cannot be read.
    """
    return ControlHttpClient.from_server_address(
        superlink,
        insecure=False,
        root_certificates=read_small(root_certificates),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )


def keep_in_step(client: Any, folder: Path) -> Changed:
    """Register and unregister once.

    Args:
        client: Flower's control client (``connect``).
        folder: holds the public keys.

    Raises:
        InvalidInput: no folder, or a file in it is no key.
        Unavailable: the SuperLink cannot be reached or refuses.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder")
    wanted, revoked = _keys_in(folder), _keys_in(folder / "revoked")
    known = {
        node.public_key: node for node in _call(client.ListNodes, ListNodesRequest()).nodes_info if node.status != GONE
    }
    registered = []
    for key, name in wanted.items():
        if key not in known and key not in revoked:
            _call(client.RegisterNode, RegisterNodeRequest(public_key=key, name=name))
            registered.append(name)
    unregistered = []
    for key, name in revoked.items():
        if key in known:
            _call(client.UnregisterNode, UnregisterNodeRequest(node_id=known[key].node_id))
            unregistered.append(name)
    unknown = [node.node_id for key, node in known.items() if key not in wanted and key not in revoked]
    return Changed(tuple(registered), tuple(unregistered), tuple(unknown))


def _keys_in(folder: Path) -> dict[bytes, str]:
    """Key as Flower stores it, to the name of its file."""
    found = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            found[node_key_pem(read_small(path))] = path.stem
        except ValueError as error:
            raise InvalidInput(f"{path}: no OpenSSH public key ({error})") from error
    return found


def _call(method: Callable[[Any], Any], request: Any) -> Any:
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise Unavailable(f"the SuperLink refuses: {error.response.text[:200]}") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the SuperLink cannot be reached ({error})") from error
