"""Messages that a machine made up: the service neither breaks nor writes, whatever comes."""

import sys
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.ledger import Ledger
from common.signing import SigningKey
from common.wire import accountant_pb2
from server.accountant import EmbeddedAccountant
from server.accountant_service import SERVICE, serve

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))
from made_up import messages

METHODS = {
    "Register": accountant_pb2.RegisterRequest,
    "Reserve": accountant_pb2.ReserveRequest,
    "Sending": accountant_pb2.SendingRequest,
    "Commit": accountant_pb2.CommitRequest,
    "Void": accountant_pb2.VoidRequest,
    "Open": accountant_pb2.OpenRequest,
    "Reconcile": accountant_pb2.ReconcileRequest,
    "Budget": accountant_pb2.BudgetRequest,
}
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,  # gRPC's own word for bytes that are no message of that kind
}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Ledger(tmp_path_factory.mktemp("fuzz") / "ledger.sqlite") as ledger:
        embedded = EmbeddedAccountant(ledger, SigningKey.generate())
        server, address = serve(embedded, "127.0.0.1:0", tls=None)
        with grpc.insecure_channel(address) as channel:
            yield embedded, channel
        server.stop(None).wait()


def call(channel, method, data):
    """The status that raw bytes get."""
    raw = channel.unary_unary(f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=None)
    try:
        raw(data, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def check(service, method, data):
    embedded, channel = service
    status = call(channel, method, data)
    assert status in EXPECTED, status
    if method != "Register" or status is not grpc.StatusCode.OK:
        return
    # A well-formed registration is no fault; it is the only thing that may have been written.
    assert {entry.kind for entry in embedded.history()} <= {"register"}


def fuzz(examples):
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )


def built(data):
    """(method, bytes) of a message that the schema allows."""
    method = data.draw(st.sampled_from(sorted(METHODS)))
    fields = data.draw(messages(METHODS[method].DESCRIPTOR))
    try:
        return method, METHODS[method](**fields).SerializeToString()
    except (ValueError, TypeError):  # a value that not even the sender can write
        return method, b""


@fuzz(400)
@given(st.data())
def test_built_messages_never_break_the_service(service, data):
    check(service, *built(data))


@fuzz(200)
@given(st.sampled_from(sorted(METHODS)), st.binary(max_size=200))
def test_arbitrary_bytes_never_break_the_service(service, method, data):
    check(service, method, data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@fuzz(10_000)
@given(st.data())
def test_ten_thousand_built_messages_never_break_the_service(service, data):
    check(service, *built(data))


def test_the_service_still_answers_and_wrote_no_reservation(service):
    embedded, channel = service
    assert call(channel, "Head", b"") is grpc.StatusCode.OK
    assert {entry.kind for entry in embedded.history()} <= {"register"}
