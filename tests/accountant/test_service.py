"""The accountant over gRPC: who may call what, when, and how large; and that nothing else is ever written."""

import datetime
import threading
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import BudgetExhausted, InvalidInput, Refused, Unavailable
from common.ledger import Ledger, verify_rows
from common.privacy import SampledGaussian
from common.signing import SigningKey
from common.wire import accountant_pb2, accountant_pb2_grpc
from server.accountant import Ask, EmbeddedAccountant, Outcome
from server.accountant_service import MOST_STREAMS, SERVICE, Tls, is_local, serve
from server.remote_accountant import RemoteAccountant

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)


@pytest.fixture
def embedded(tmp_path, accountant_key):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield EmbeddedAccountant(ledger, accountant_key)


@pytest.fixture
def address(embedded):
    server, address = serve(embedded, "127.0.0.1:0", tls=None)
    yield address
    server.stop(None).wait()


class Authority:
    """A certificate authority for one test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        folder.mkdir()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.certificate = self._sign(self.name, self.key, authority=True)
        (folder / "authority.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def issue(self, role: str | None, name: str) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if role is not None:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role))
        certificate = self._sign(x509.Name(attributes), key)
        stem = self.folder / f"{role}-{name}"
        stem.with_suffix(".crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        stem.with_suffix(".key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Tls(stem.with_suffix(".crt"), stem.with_suffix(".key"), self.folder / "authority.pem")

    def _sign(self, name, key, *, authority=False):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            local = x509.SubjectAlternativeName([x509.DNSName("localhost")])
            builder = builder.add_extension(local, critical=False)
        return builder.sign(self.key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


@pytest.fixture
def secure_address(embedded, authority):
    server, address = serve(embedded, "localhost:0", tls=authority.issue(None, "accountant"))
    yield address
    server.stop(None).wait()


def test_roles_follow_from_the_certificate(secure_address, authority, registration):
    coordinator = RemoteAccountant(secure_address, tls=authority.issue("coordinator", "main"), timeout_s=10)
    auditor = RemoteAccountant(secure_address, tls=authority.issue("auditor", "eve"), timeout_s=10)
    client = RemoteAccountant(secure_address, tls=authority.issue("client", "a"), timeout_s=10)
    with coordinator, auditor, client:
        coordinator.register("run", {"a": registration(), "b": registration()})
        answer = coordinator.reserve("run", 1, [Ask("a", EVENT), Ask("b", EVENT)])
        ids = [signed.reservation.reservation_id for signed in answer.granted]
        coordinator.sending("run", ids)
        coordinator.commit("run", dict.fromkeys(ids, Outcome.REPLIED))
        head = coordinator.head()
        forbidden = [
            lambda who: who.register("run-2", {"a": registration()}),
            lambda who: who.reserve("run", 2, [Ask("a", EVENT)]),
            lambda who: who.sending("run", ids),
            lambda who: who.commit("run", {ids[0]: Outcome.LATE}),
            lambda who: who.void("run", ids[0]),
            lambda who: who.open("run"),
        ]
        for who in (auditor, client):
            for call in forbidden:
                with pytest.raises(Refused, match="may not do this"):
                    call(who)
        assert coordinator.head() == head
        assert auditor.spent("run", "b") == coordinator.spent("run", "b")
        assert verify_rows(auditor.history(), anchor=head) == 6
        assert client.spent("run", "a").events == (EVENT,)
        with pytest.raises(Refused, match="its own budget"):
            client.spent("run", "b")
        assert [(row.kind, '"client":"a"' in row.body) for row in client.history(scope="run")] == [
            ("register", True),
            ("reserve", True),
        ]
        with pytest.raises(Refused, match="may not do this"):
            next(client.watch())


def test_who_shows_no_known_certificate_gets_nothing(secure_address, authority, tmp_path, embedded):
    head = embedded.head()
    for tls in (authority.issue("emperor", "x"), authority.issue(None, "x")):
        with pytest.raises(Refused, match="no role"):
            RemoteAccountant(secure_address, tls=tls, timeout_s=10)
    stranger = Authority(tmp_path / "stranger").issue("coordinator", "x")
    with pytest.raises(Unavailable):
        RemoteAccountant(secure_address, tls=stranger, timeout_s=1)
    trusting = Tls(stranger.certificate, stranger.key, authority.folder / "authority.pem")
    with pytest.raises(Unavailable):
        RemoteAccountant(secure_address, tls=trusting, timeout_s=1)
    with pytest.raises(Unavailable):
        RemoteAccountant(secure_address.replace("localhost", "127.0.0.1"), timeout_s=1)
    assert embedded.head() == head


def test_plain_text_stays_on_this_machine(embedded, tmp_path):
    assert is_local("127.0.0.1:1")
    assert is_local("[::1]:1")
    assert is_local("localhost:1")
    for address in ("0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.org:1"):
        with pytest.raises(InvalidInput, match="plain text"):
            serve(embedded, address, tls=None)
        with pytest.raises(InvalidInput, match="plain text"):
            RemoteAccountant(address)
    server, address = serve(embedded, f"unix:{tmp_path}/socket", tls=None)
    with RemoteAccountant(address, timeout_s=10) as remote:
        assert remote.head() == embedded.head()
    server.stop(None).wait()


def test_the_accountants_key_is_pinned(address, embedded):
    RemoteAccountant(address, public_key=embedded.public_key).close()
    with pytest.raises(Refused, match="another key"):
        RemoteAccountant(address, public_key=SigningKey.generate().public_key)


def test_a_budget_that_is_exhausted_arrives_with_its_numbers(address, registration):
    with RemoteAccountant(address) as remote:
        with pytest.raises(BudgetExhausted) as caught:
            remote.register("run", {"a": registration(target_epsilon=0.1)})
        assert (caught.value.client, caught.value.target) == ("a", 0.1)
        assert caught.value.asked > 0.1


def test_a_call_needs_a_deadline_and_a_size(address, embedded):
    with grpc.insecure_channel(address) as channel:
        stub = accountant_pb2_grpc.AccountantStub(channel)
        for timeout in (None, 10_000):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Head(accountant_pb2.HeadRequest(), timeout=timeout)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        large = accountant_pb2.SendingRequest(run_id="r", reservation_ids=["x" * 1_000_000] * 40)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Sending(large, timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert embedded.head() == "0" * 64


def test_malformed_messages_are_invalid_and_write_nothing(address, embedded):
    pb = accountant_pb2
    with grpc.insecure_channel(address) as channel:
        stub = accountant_pb2_grpc.AccountantStub(channel)
        registration = pb.Registration(client="a", dataset="d", public_key="k")
        bad = [
            (stub.Register, pb.RegisterRequest(run_id="", registrations=[registration])),
            (stub.Register, pb.RegisterRequest(run_id="r", registrations=[registration, registration])),
            (stub.Register, pb.RegisterRequest(run_id="r", registrations=[pb.Registration(client="a\n")])),
            (stub.Register, pb.RegisterRequest(run_id="r", registrations=[pb.Registration(
                client="a", dataset="d", public_key="k", budget=pb.Budget(target_epsilon=1, relation="x", unit="u"))])),
            (stub.Reserve, pb.ReserveRequest(run_id="r", server_round=1, asks=[pb.Ask(client="a", event={})])),
            (stub.Reserve, pb.ReserveRequest(run_id="r", server_round=0, asks=[])),
            (stub.Commit, pb.CommitRequest(run_id="r", outcomes={"x": 0})),
            (stub.Commit, pb.CommitRequest(run_id="r", outcomes={"x": 99})),
            (stub.Void, pb.VoidRequest(run_id="r", refusal={"reservation_id": "x"})),
            (stub.Budget, pb.BudgetRequest(run_id="r")),
        ]  # fmt: skip
        for method, request in bad:
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
    assert embedded.head() == "0" * 64


def test_watchers_see_each_change_and_are_few(address, embedded, registration):
    with RemoteAccountant(address) as remote:
        heads = remote.watch(timeout_s=20)
        assert next(heads) == embedded.head()
        threading.Timer(0.1, embedded.register, ["run", {"a": registration()}]).start()
        assert next(heads) == embedded.head() != "0" * 64
        others = [remote.watch(timeout_s=20) for _ in range(MOST_STREAMS - 1)]
        for other in others:
            next(other)
        with pytest.raises(Unavailable, match="streams"):
            next(remote.watch(timeout_s=20))
        assert remote.head() == embedded.head()


def test_the_service_reports_its_health(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_call_waits_for_a_service_that_is_started_again(embedded, tmp_path, registration):
    address = f"unix:{tmp_path}/socket"
    server, _ = serve(embedded, address, tls=None)
    with RemoteAccountant(address, timeout_s=20) as remote:
        server.stop(None).wait()
        started = []
        threading.Timer(0.5, lambda: started.append(serve(embedded, address, tls=None))).start()
        remote.register("run", {"a": registration()})
        assert remote.participations("run", "a") == 0
        started[0][0].stop(None).wait()
    with pytest.raises(Unavailable):
        RemoteAccountant(address, timeout_s=0.3)
