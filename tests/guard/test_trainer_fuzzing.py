"""Messages that a machine made up reach the trainer's service: it neither breaks, nor writes, nor looks at a record."""

import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.guard import Guard
from client.policy import DatasetPolicy, Policy
from client.trainer_service import SERVICE, serve
from common.messages import Description
from common.signing import SigningKey
from common.wire import trainer_pb2

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))
sys.path.insert(0, str(Path(__file__).parent))
from guarded_trainer import GuardedTrainer
from made_up import messages

SHAPES = {"a": (2, 2)}
CALLS = {
    name: (GetMessageClass(call.input_type), GetMessageClass(call.output_type))
    for name, call in trainer_pb2.DESCRIPTOR.services_by_name["Trainer"].methods_by_name.items()
}
"""Every call of the service, those that are added later too: its question and its answer."""
EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    policy = Policy(
        organisation="a",
        datasets={"notes": DatasetPolicy(declared_records=1000, target_epsilon=8.0, without_privacy=True)},
        min_noise_multiplier=1e-3,
        max_sample_rate=1.0,
        max_steps_per_round=10**6,
        backbones=("", "b", "b" * 64),
        coordinator_keys=(SigningKey.generate().public_key,),
        accountant_keys=(SigningKey.generate().public_key,),
    )
    guard = Guard(policy, folder / "own.sqlite", key=SigningKey.generate())
    description = Description("a", "notes", guard.public_key, 1000, "b" * 64, SHAPES, ("a",), "h" * 64)
    trainer = GuardedTrainer(guard, description)
    server = serve(trainer, f"unix:{folder}/t.sock")
    with grpc.insecure_channel(f"unix:{folder}/t.sock") as channel:
        yield trainer, channel
    server.stop(None).wait()
    guard.close()


def call(channel, method, data):
    """(status, bytes of the answer) for raw bytes."""
    raw = channel.unary_unary(f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=None)
    try:
        return grpc.StatusCode.OK, raw(data, timeout=20)
    except grpc.RpcError as error:
        return error.code(), b""


def check(service, method, data, *, is_message):
    trainer, channel = service
    status, answer = call(channel, method, data)
    # Bytes that are no message of that kind get gRPC's own word.
    assert status in (EXPECTED if is_message else EXPECTED | {grpc.StatusCode.INTERNAL})
    if status is grpc.StatusCode.OK and method != "Describe":
        kind = CALLS[method][1].FromString(answer).WhichOneof("answer")
        assert kind in ("refusal", "status"), "nobody's key signed this: nothing else may leave"
    assert trainer.reads == 0
    assert trainer.guard._ledger.verify() == 0, "a line was written"


def fuzz(examples):
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )


def built(data):
    """(method, bytes) of a message that the schema allows."""
    method = data.draw(st.sampled_from([*sorted(CALLS), "Train", "Train"]))
    question = CALLS[method][0]
    fields = data.draw(messages(question.DESCRIPTOR))
    try:
        return method, question(**fields).SerializeToString()
    except (ValueError, TypeError):  # a value that not even the sender can write
        return method, b""


@fuzz(300)
@given(st.data())
def test_built_messages_never_break_the_service(service, data):
    check(service, *built(data), is_message=True)


@fuzz(100)
@given(st.sampled_from(sorted(CALLS)), st.binary(max_size=200))
def test_arbitrary_bytes_never_break_the_service(service, method, data):
    check(service, method, data, is_message=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@fuzz(10_000)
@given(st.data())
def test_ten_thousand_built_messages_never_break_the_service(service, data):
    check(service, *built(data), is_message=True)


def test_the_service_still_answers(service):
    trainer, channel = service
    status, answer = call(channel, "Describe", b"")
    assert status is grpc.StatusCode.OK
    assert trainer_pb2.Description.FromString(answer).client == "a"
    assert trainer.reads == 0
