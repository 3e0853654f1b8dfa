"""The trainer behind its service, and the count of reads: no lie reaches a record."""

import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from client.trainer_service import SERVICE, RemoteTrainer, serve
from common.errors import InvalidInput, Unavailable
from common.messages import Description, Refusal, RefusalReason, Reply, Status, StatusCode
from common.wire import trainer as translate
from common.wire import trainer_pb2

sys.path.insert(0, str(Path(__file__).parent))
from guarded_trainer import GuardedTrainer

SHAPES = {"a.lora_B": (4, 2), "b.lora_B": (3, 2)}
DESCRIPTION = Description("clinic-a", "notes", "key", 1000, "b" * 64, SHAPES, tuple(SHAPES), "h" * 64)


@pytest.fixture
def trainer(guard):
    return GuardedTrainer(guard, DESCRIPTION)


@pytest.fixture
def remote(trainer, tmp_path):
    server = serve(trainer, f"unix:{tmp_path}/trainer.sock")
    remote = RemoteTrainer(f"unix:{tmp_path}/trainer.sock", timeout_s=20)
    yield remote
    remote.close()
    server.stop(None).wait()


def test_a_round_over_the_socket_gives_the_same_bytes_again(parties, trainer, remote):
    assert remote.describe() == DESCRIPTION
    request = parties.request()
    first, again = remote.train(request), remote.train(request)
    assert isinstance(first, Reply)
    assert (first.reservation_id, first.ledger_head) == (again.reservation_id, again.ledger_head)
    assert all(np.array_equal(first.update[name], again.update[name]) for name in SHAPES)
    assert trainer.reads == 1


def test_a_relay_that_bypasses_the_policy_reaches_no_record(parties, trainer, remote, change):
    good = parties.request()
    lies = [
        parties.request(backbone_hash="c" * 64),
        parties.request(local_steps=9),
        parties.request(client="clinic-b"),
        parties.request(event=None),
        change(good, parties, participation=2**31),
        parties.request(reservation={"server_round": 9}),
    ]
    for request in lies:
        answer = remote.train(request)
        assert isinstance(answer, Refusal)
        answer.check(trainer.guard.public_key)
    unsigned = translate.write_train_request(good)
    unsigned.plan.learning_rate = 0.5
    answer = translate.read_train_response(remote._stub.Train(unsigned, timeout=20))
    assert (answer.reason, answer.voiding) == (RefusalReason.SIGNATURE, False)
    assert trainer.reads == 0


def test_malformed_bytes_are_invalid_and_write_nothing(parties, trainer, remote):
    head = trainer.guard.head(parties.coordinator.public_key)
    for spoil in (
        lambda m: m.ClearField("plan"),
        lambda m: m.ClearField("reservation"),
        lambda m: m.adapter[0].shape.append(7),
        lambda m: setattr(m.plan, "learning_rate", float("nan")),
        lambda m: m.plan.envelope.parts.add(count=5),
    ):
        message = translate.write_train_request(parties.request())
        spoil(message)
        with pytest.raises(grpc.RpcError) as caught:
            remote._stub.Train(message, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "the request is malformed"
    assert trainer.guard.head(parties.coordinator.public_key) == head
    assert trainer.reads == 0


def test_a_fault_inside_says_nothing_about_itself(parties, trainer, remote, tmp_path):
    class Broken(GuardedTrainer):
        def train(self, request):
            raise RuntimeError("record 17 says: secret")

    server = serve(Broken(trainer.guard, DESCRIPTION), f"unix:{tmp_path}/broken.sock")
    broken = RemoteTrainer(f"unix:{tmp_path}/broken.sock", timeout_s=20)
    assert broken.train(parties.request()) == Status(StatusCode.UNAVAILABLE)
    broken.close()
    server.stop(None).wait()
    with pytest.raises(Unavailable, match="UNAVAILABLE"):
        RemoteTrainer(f"unix:{tmp_path}/nobody.sock", timeout_s=0.5).describe()


def spoiled(data, random):
    """The message with three of its bytes changed."""
    copy = bytearray(data)
    for position in random.integers(0, len(copy), 3):
        copy[position] ^= int(random.integers(1, 256))
    return bytes(copy)


def outcome(raw, data):
    """The status, or the kind of answer, that raw bytes get."""
    try:
        return type(translate.read_train_response(trainer_pb2.TrainResponse.FromString(raw(data, timeout=20))))
    except grpc.RpcError as error:
        return error.code()


def test_random_bytes_do_not_break_the_service(remote, parties):
    raw = remote._channel.unary_unary(f"/{SERVICE}/Train")
    random = np.random.default_rng(0)
    good = translate.write_train_request(parties.request()).SerializeToString()
    answers = [outcome(raw, spoiled(good, random)) for _ in range(150)]
    assert set(answers) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, Refusal}
    assert isinstance(remote.train(parties.request()), Reply)


def test_a_remote_malformed_answer_is_an_error_of_ours(remote):
    with pytest.raises(InvalidInput):
        translate.read_train_response(trainer_pb2.TrainResponse())


def test_its_health_says_serving_while_it_runs_and_nothing_of_what_it_does(trainer, remote, tmp_path):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"unix:{tmp_path}/trainer.sock") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert [field.name for field in answer.DESCRIPTOR.fields] == ["status"]
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="records"), timeout=20)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert trainer.reads == 0
