"""The relay's way to the trainer: gRPC on a Unix socket or an internal network, and nothing else.

The channel carries what ``proto/cloister/v1/trainer.proto`` allows: one request downwards, four things upwards.
"""

from __future__ import annotations

import grpc
from flwr.app import Context

from common.errors import InvalidInput
from common.messages import Description, Refusal, Reply, Status, StatusCode, TrainRequest
from common.wire import trainer_pb2, trainer_pb2_grpc
from common.wire.translate import read_description, read_train_response, write_train_request

MAX_MESSAGE_BYTES = 1 << 30
"""An adapter or an update; larger messages are refused by both ends."""

OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
DESCRIBE_TIMEOUT_S = 30.0
TRAIN_TIMEOUT_S = 12 * 3600.0


class TrainerOverGrpc:
    """A trainer behind ``address`` (``unix:/path`` or ``host:port`` on an internal network)."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = trainer_pb2_grpc.TrainerStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def describe(self) -> Description:
        """The public facts; raises ``grpc.RpcError`` if the trainer cannot be reached."""
        return read_description(self._stub.Describe(trainer_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S))

    def train(self, request: TrainRequest) -> Reply | Refusal | Status:
        """One round; a trainer that cannot be reached is a status, so that nothing about it leaves as free text."""
        try:
            return read_train_response(self._stub.Train(write_train_request(request), timeout=TRAIN_TIMEOUT_S))
        except grpc.RpcError:
            return Status(StatusCode.UNAVAILABLE)


def connect_by_address(context: Context) -> TrainerOverGrpc:
    """The trainer named in the node's configuration: ``--node-config "trainer='unix:/run/cloister/trainer.sock'"``.

    Raises:
        InvalidInput: the node's configuration names none.
    """
    address = context.node_config.get("trainer")
    if not address:
        raise InvalidInput("this node names no trainer: start it with --node-config \"trainer='unix:/path/to/socket'\"")
    return TrainerOverGrpc(str(address))
