"""What a revocation does to running services: the accountant refuses, the SuperLink strikes the node off."""

from contextlib import contextmanager

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import NodeAuthHttpInterceptor
from typer.testing import CliRunner

from common.errors import CloisterError, InvalidInput, Unavailable
from common.ledger import Ledger
from common.signing import SigningKey
from deploy.cli import app
from deploy.provisioning.nodes import Changed, connect, keep_in_step
from deploy.provisioning.provision import Federation, init
from server.accountant import EmbeddedAccountant
from server.accountant_service import Tls, serve
from server.remote_accountant import RemoteAccountant
from server.revocation import RevocationList, read_revoked, write_revoked

BEAT_S = 30.0


@pytest.fixture
def accountant(federation, tmp_path):
    """Address of an accountant that was started from the federation's files."""
    side = federation.folder / "coordinator" / "accountant"
    with Ledger(str(tmp_path / "ledger.sqlite")) as ledger:
        server, address = serve(
            EmbeddedAccountant(ledger, SigningKey.load(side / "accountant.key")),
            "127.0.0.1:0",
            tls=Tls(side / "tls.crt", side / "tls.key", side / "ca.crt"),
            revoked=RevocationList(side / "revoked.json"),
        )
        try:
            yield address
        finally:
            server.stop(0).wait()


def caller(folder) -> Tls:
    return Tls(folder / "client.crt", folder / "client-tls.key", folder / "ca.crt")


def test_a_kit_opens_the_accountant_until_it_is_revoked_while_others_go_on(federation, now, accountant):
    kits = {name: federation.add(name, now) for name in ("clinic-a", "clinic-b")}
    key = (kits["clinic-a"] / "accountant.pub").read_text().strip()
    with (
        RemoteAccountant(accountant, tls=caller(kits["clinic-a"]), public_key=key, timeout_s=10) as a,
        RemoteAccountant(accountant, tls=caller(kits["clinic-b"]), public_key=key, timeout_s=10) as b,
        RemoteAccountant(accountant, tls=caller(federation.folder / "coordinator" / "superexec"), timeout_s=10) as own,
    ):
        assert a.head() == b.head() == own.head()
        federation.revoke("clinic-a")
        with pytest.raises(CloisterError, match="no role"):
            a.head()
        assert b.head() == own.head()
        second = federation.rotate("clinic-a", now)
        with RemoteAccountant(accountant, tls=caller(second), public_key=key, timeout_s=10) as again:
            assert again.head() == own.head()


def test_a_stream_that_was_open_ends_too(federation, now, accountant):
    kit = federation.add("court", now, role="auditor")
    with RemoteAccountant(accountant, tls=caller(kit), timeout_s=10) as auditor:
        heads = auditor.watch(timeout_s=30)
        next(heads)
        federation.revoke("court")
        with pytest.raises(CloisterError, match="revoked"):
            next(heads)


def test_without_a_readable_list_nobody_is_let_in(federation, now, accountant):
    kit = federation.add("clinic-a", now)
    path = federation.folder / "coordinator" / "accountant" / "revoked.json"
    with RemoteAccountant(accountant, tls=caller(kit), timeout_s=10) as a:
        for content in (b"", b"[]", b'{"version": 2, "serials": {}}', b'{"version": 1, "serials": {"xyz": "a"}}'):
            path.write_bytes(content)
            with pytest.raises(CloisterError, match="no role"):
                a.head()
        path.unlink()
        with pytest.raises(CloisterError, match="no role"):
            a.head()
        path.write_bytes(write_revoked({}))
        a.head()


def test_a_service_does_not_start_on_a_list_it_cannot_read(tmp_path):
    with pytest.raises(InvalidInput):
        RevocationList(tmp_path / "none.json")
    (tmp_path / "list.json").write_bytes(write_revoked({"AB": "x.1"}))
    assert read_revoked(tmp_path / "list.json") == {"ab": "x.1"}
    revoked = RevocationList(tmp_path / "list.json")
    with Ledger(str(tmp_path / "l.sqlite")) as ledger:
        accountant = EmbeddedAccountant(ledger, SigningKey.generate())
        with pytest.raises(InvalidInput, match="identifies nobody"):
            serve(accountant, "127.0.0.1:0", tls=None, revoked=revoked)


def test_a_kit_of_another_federation_or_none_gets_no_connection(federation, now, accountant, tmp_path):
    init(tmp_path / "other", "127.0.0.1:8443", now)
    stranger = Federation(tmp_path / "other").add("clinic-a", now)
    mine = federation.add("clinic-a", now)
    tls = Tls(stranger / "client.crt", stranger / "client-tls.key", mine / "ca.crt")
    with pytest.raises(Unavailable):
        RemoteAccountant(accountant, tls=tls, timeout_s=2)
    bare = grpc.secure_channel(accountant, grpc.ssl_channel_credentials((mine / "ca.crt").read_bytes()))
    with bare, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(bare).result(timeout=2)


@contextmanager
def fleet(address, kit):
    """The fleet interface as a SuperNode with this kit sees it, and its public key as Flower writes it."""
    key = load_ssh_private_key((kit / "supernode.key").read_bytes(), None)
    with FleetHttpClient.from_server_address(
        address,
        insecure=False,
        root_certificates=(kit / "ca.crt").read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    ) as client:
        yield client, public_key_to_bytes(key.public_key())


def activate(address, kit):
    """What a SuperNode sends first; returns its node id."""
    with fleet(address, kit) as (client, public):
        return client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=BEAT_S)).node_id


def beats(address, kit, node_id):
    """What a SuperNode sends every 30 s."""
    with fleet(address, kit) as (client, _):
        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=BEAT_S)
        return client.SendNodeHeartbeat(request).success


def test_the_superlink_takes_registered_nodes_and_strikes_off_revoked_ones(lasting_federation, superlink, now):
    federation, folder = lasting_federation, lasting_federation.folder / "coordinator" / "nodes"
    kits = {name: federation.add(name, now) for name in ("clinic-a", "clinic-b")}
    with pytest.raises(httpx.HTTPStatusError):
        activate(superlink, kits["clinic-a"])
    with connect(superlink, folder / "ca.crt") as control:
        assert keep_in_step(control, folder).registered == ("clinic-a.1", "clinic-b.1")
        assert keep_in_step(control, folder) == Changed()
        ids = {name: activate(superlink, kit) for name, kit in kits.items()}
        assert len(set(ids.values())) == 2
        assert all(beats(superlink, kits[name], ids[name]) for name in kits)
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            beats(superlink, kits["clinic-a"], ids["clinic-b"])
        federation.revoke("clinic-a")
        assert keep_in_step(control, folder).unregistered == ("clinic-a.1",)
        with pytest.raises(httpx.HTTPStatusError):
            activate(superlink, kits["clinic-a"])
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            beats(superlink, kits["clinic-a"], ids["clinic-a"])
        assert beats(superlink, kits["clinic-b"], ids["clinic-b"])
        # An empty folder, as an unmounted volume shows it, strikes nobody off.
        empty = federation.folder / "empty"
        empty.mkdir()
        assert keep_in_step(control, empty).unknown == (ids["clinic-b"],)
        assert beats(superlink, kits["clinic-b"], ids["clinic-b"])
        # A key that came back from the revoked ones stays out.
        (folder / "back.pub").write_bytes((folder / "revoked" / "clinic-a.1.pub").read_bytes())
        assert keep_in_step(control, folder).registered == ()
        (folder / "broken.pub").write_text("nothing")
        with pytest.raises(InvalidInput, match=r"broken\.pub"):
            keep_in_step(control, folder)
        (folder / "broken.pub").unlink()
        (folder / "back.pub").unlink()


def test_the_command_says_what_it_did_and_what_it_could_not_reach(lasting_federation, superlink, now):
    folder = lasting_federation.folder / "coordinator" / "nodes"
    lasting_federation.add("clinic-z", now)
    options = [str(folder), "--root-certificates", str(folder / "ca.crt"), "--superlink"]
    assert "clinic-z.1: registered" in CliRunner().invoke(app, ["provision", "nodes", *options, superlink]).output
    failed = CliRunner().invoke(app, ["provision", "nodes", *options, "127.0.0.1:9"])
    assert isinstance(failed.exception, Unavailable)
