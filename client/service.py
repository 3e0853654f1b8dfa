"""The trainer as a process of its own: one request at a time, over gRPC, to the relay and to nobody else.

A Unix socket or an internal network is the access control: whoever reaches it can ask, and the guard decides on the
signatures inside each request.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc

from client.connection import OPTIONS
from common.errors import CloisterError
from common.messages import Description, Refusal, Reply, Status, StatusCode, TrainRequest
from common.wire import trainer_pb2_grpc
from common.wire.faults import status_of
from common.wire.translate import read_train_request, write_description, write_train_response

log = logging.getLogger(__name__)


class Trains(Protocol):
    """What is served; ``client/trainer.py`` has it."""

    def describe(self) -> Description:
        """The public facts."""

    def train(self, request: TrainRequest) -> Reply | Refusal | Status:
        """One round."""


class TrainerService(trainer_pb2_grpc.TrainerServicer):
    """Serves one trainer. No error text leaves: it could carry something about a record."""

    def __init__(self, trainer: Trains) -> None:
        self._trainer = trainer
        self._lock = threading.Lock()

    def Describe(self, request, context):  # type: ignore[no-untyped-def]
        """The public facts."""
        return write_description(self._trainer.describe())

    def Train(self, request, context):  # type: ignore[no-untyped-def]
        """One round; busy while another runs."""
        try:
            asked = read_train_request(request)
        except CloisterError as error:
            context.abort(status_of(error), "the request is malformed")
        if not self._lock.acquire(blocking=False):
            return write_train_response(Status(StatusCode.BUSY))
        try:
            return write_train_response(self._trainer.train(asked))
        except CloisterError as error:
            log.exception("a request could not be served")
            context.abort(status_of(error), "the trainer cannot serve this now; its own log says why")
        finally:
            self._lock.release()


def serve_trainer(trainer: Trains, address: str, *, workers: int = 4) -> grpc.Server:
    """Start serving on ``address``; the caller stops the server that is returned."""
    server = grpc.server(ThreadPoolExecutor(max_workers=workers), options=OPTIONS)
    trainer_pb2_grpc.add_TrainerServicer_to_server(TrainerService(trainer), server)
    if server.add_insecure_port(address) == 0 and not address.startswith("unix:"):
        raise CloisterError(f"{address}: cannot listen there; is another trainer running?")
    server.start()
    return server
