"""The coordinator's door as a plain process: a real nginx before a real SuperLink, seen from a client's position."""

import http.client
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import NodeAuthHttpInterceptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.provisioning.nodes import connect, keep_in_step
from deploy.provisioning.provision import init, request_keys
from deploy.running.doctor import free_port

sys.path.insert(0, str(Path(__file__).parent))
from door import NGINX, Proxy

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")

CALLS = {
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
}
SECRETS = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/health",
    "/docs",
    "/openapi.json",
    "/",
)
DETOURS = (
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%5ccontrol/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "/V1/control/list-runs",
    "/v1/control/list-runs?x=/v1/fleet/pull-messages",
    "/v1/control/list-runs#/v1/fleet/pull-messages",
    "/v1/control/list-runs%23/v1/fleet/pull-messages",
    "/v1/control/list-runs;/v1/fleet/pull-messages",
    "/v1/control%2flist-runs",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%0a",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/anything",
    "http://superlink/v1/control/list-runs",
)


class Upstream(BaseHTTPRequestHandler):
    """Writes down what the proxy passes on."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_POST

    def log_message(self, *_):
        """Keep the test's output quiet."""


@contextmanager
def writing_down(side):
    """A server with the SuperLink's certificate of ``side``, and the list of paths that reached it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.seen, server.daemon_threads = [], True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(side / "superlink" / "tls.crt", side / "superlink" / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", server.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running(*arguments):
    made = Proxy(*arguments)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def beside(lasting_federation, tmp_path_factory):
    side = lasting_federation.folder / "coordinator"
    with writing_down(side) as (upstream, seen), running(tmp_path_factory.mktemp("nginx"), side, upstream) as proxy:
        yield proxy, seen


@pytest.fixture
def listening(beside):
    """A proxy before a server that writes down every path that reaches it."""
    beside[1].clear()
    return beside


@pytest.fixture(scope="module")
def proxy(lasting_federation, superlink, tmp_path_factory):
    """A proxy before a real SuperLink."""
    side = lasting_federation.folder / "coordinator"
    with running(tmp_path_factory.mktemp("nginx"), side, superlink) as made:
        yield made


@pytest.mark.parametrize("path", SECRETS + DETOURS)
def test_nothing_but_the_fleet_reaches_the_superlink(listening, path):
    proxy, seen = listening
    for method in ("POST", "GET"):
        assert proxy.ask(path, method=method) in (400, 404), path
    assert seen == []


PIECES = ("/", "v1", "fleet", "control", "runtime", "pull-messages", "list-runs", "..", ".", "%2e", "%2F", "%5c", "\\")
PIECES += ("%0a", "%0d%0a", "?", "#", ";", "%00", "%3f", "%", "//", "/v1/fleet/", "/v1/control/", "pull-messages/", "A")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), st.sampled_from(["POST", "GET", "CONNECT", "PUT"]))
def test_whatever_is_asked_the_superlink_sees_the_named_calls_only(listening, pieces, method):
    proxy, seen = listening
    proxy.raw(f"{method} /{''.join(pieces)} HTTP/1.1".encode())
    assert set(seen) <= CALLS


def test_the_named_calls_pass_as_they_are_and_by_post_only(listening):
    proxy, seen = listening
    for call in sorted(CALLS):
        assert proxy.ask(f"{call}?drop=this") == 200
        assert proxy.ask(call, method="GET") == 405
    assert seen == sorted(CALLS)
    seen.clear()
    assert proxy.ask("/v1/control/../fleet/pull-messages") == 200
    assert seen == ["/v1/fleet/pull-messages"]  # what was compared, not what was sent


def test_flowers_own_list_of_calls_holds_every_named_one():
    """A newer Flower that renames a call breaks here and not in the field."""
    known = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert known - CALLS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert known >= CALLS


def test_a_piece_of_an_array_passes_and_a_larger_body_does_not(listening):
    proxy, seen = listening
    piece = b"x" * (5 * 2**20 + 4096)
    assert proxy.ask("/v1/fleet/push-object", body=piece) == 200
    assert proxy.ask("/v1/fleet/push-object", headers={"Content-Length": str(17 * 2**20)}) == 413
    assert proxy.ask("/v1/fleet/push-object", headers={"X": "y" * 40_000}) in (400, 414, 431)
    assert seen == ["/v1/fleet/push-object"]


def test_a_flood_is_answered_503_and_ends(listening, lasting_federation, tmp_path):
    """503 and not 429: Flower's client waits and tries again on the one and gives up on the other."""
    side = lasting_federation.folder / "coordinator"
    with writing_down(side) as (upstream, seen), running(tmp_path, side, upstream) as proxy:

        def flood(_):
            connection, answers = proxy.connect(), []
            for _ in range(80):
                connection.request("POST", "/v1/fleet/pull-messages", b"")
                answer = connection.getresponse()
                answer.read()
                answers.append(answer.status)
            connection.close()
            return answers

        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = [status for some in pool.map(flood, range(8)) for status in some]
        allowed = 200 + 50 * (time.monotonic() - started) + 2
        assert set(answers) == {200, 503}
        assert len(seen) == answers.count(200) <= allowed
        time.sleep(0.5)
        assert proxy.ask("/v1/fleet/pull-messages") == 200


def test_plain_text_old_tls_and_another_authority_are_refused(listening, lasting_federation):
    proxy, seen = listening
    plain = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    plain.request("POST", "/v1/fleet/pull-messages", b"")
    assert plain.getresponse().status == 400
    plain.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        ssl.create_default_context().wrap_socket(
            socket.create_connection(("127.0.0.1", proxy.port), timeout=10), server_hostname="127.0.0.1"
        )
    old = ssl.create_default_context(cafile=str(proxy.authority))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        old.wrap_socket(socket.create_connection(("127.0.0.1", proxy.port), timeout=10), server_hostname="127.0.0.1")
    assert seen == []


def test_a_superlink_of_another_authority_or_none_is_502(lasting_federation, tmp_path):
    """502 is a status on which Flower's client tries again."""
    init(tmp_path / "other", "127.0.0.1:8443", datetime.now(UTC))
    side = lasting_federation.folder / "coordinator"
    (tmp_path / "nginx").mkdir()
    with (
        writing_down(tmp_path / "other" / "coordinator") as (upstream, seen),
        running(tmp_path / "nginx", side, upstream) as proxy,
    ):
        assert proxy.ask("/v1/fleet/pull-messages") == 502
        assert seen == []
    with running(tmp_path / "nginx", side, f"127.0.0.1:{free_port()}") as proxy:
        assert proxy.ask("/v1/fleet/pull-messages") == 502


@contextmanager
def fleet(proxy, kit):
    key = load_ssh_private_key((kit / "supernode.key").read_bytes(), None)
    with FleetHttpClient.from_server_address(
        f"127.0.0.1:{proxy.port}",
        insecure=False,
        root_certificates=(kit / "ca.crt").read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    ) as client:
        yield client, public_key_to_bytes(key.public_key())


def test_a_registered_node_is_let_in_and_a_stranger_gets_nothing(proxy, lasting_federation, superlink, tmp_path):
    nodes = lasting_federation.folder / "coordinator" / "nodes"
    kit = lasting_federation.add("clinic-p", datetime.now(UTC))
    with connect(superlink, nodes / "ca.crt") as control:
        keep_in_step(control, nodes)
    with fleet(proxy, kit) as (client, public):
        node = Node(node_id=client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id)
        assert not client.PullMessages(PullMessagesRequest(node=node)).messages_list
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        assert refused.value.response.status_code == 404
    request_keys(tmp_path / "stranger", "clinic-s")
    stranger = tmp_path / "stranger" / "private"
    (stranger / "ca.crt").write_bytes((kit / "ca.crt").read_bytes())
    with fleet(proxy, stranger) as (client, public):
        with pytest.raises(httpx.HTTPStatusError):
            client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
        for request in (PullMessagesRequest(node=node), PullMessagesRequest()):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                client.PullMessages(request)
            assert refused.value.response.status_code == 401
    unsigned = PullMessagesRequest(node=node).SerializeToString()
    headers = {"Content-Type": "application/protobuf"}
    assert {proxy.ask(call, body=unsigned, headers=headers) for call in CALLS} <= {400, 401}
