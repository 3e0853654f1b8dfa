"""Messages that a machine made up: the service neither breaks nor writes, whatever comes."""

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.ledger import Ledger
from common.signing import SigningKey
from common.wire import accountant_pb2
from server.accountant import EmbeddedAccountant
from server.accountant_service import SERVICE, serve

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
texts = st.sampled_from(["", "run", "a", "notes", "\n", "ε" * 300]) | st.text(max_size=8)


def values(field):
    """A strategy for one field of a message, by its type."""
    kinds = {
        field.CPPTYPE_STRING: texts,
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_DOUBLE: st.sampled_from([0.0, 1.0, -1.0, 1e-5, 1e308, 5e-324]) | st.floats(),
        field.CPPTYPE_UINT32: st.integers(0, 3) | st.integers(0, 2**32 - 1),
        field.CPPTYPE_UINT64: st.integers(0, 3) | st.integers(0, 2**64 - 1),
        field.CPPTYPE_ENUM: st.integers(-1, 12),
    }
    return messages(field.message_type) if field.message_type else kinds[field.cpp_type]


@st.composite
def messages(draw, descriptor):
    """A message of that type with some of its fields set."""
    message = {}
    for field in descriptor.fields:
        if descriptor.name != "RegisterRequest" and draw(st.integers(0, 3)) == 0:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            message[field.name] = draw(st.dictionaries(values(entry["key"]), values(entry["value"]), max_size=2))
        elif field.is_repeated:
            message[field.name] = draw(st.lists(values(field), max_size=2))
        else:
            message[field.name] = draw(values(field))
    return message


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
