"""Flower's ``Grid`` in one process: the same ServerApp and ClientApp code, without Flower's server or Ray.

A message is answered when its reply is pulled, so only one client's update is in memory at a time, and the order of
clients is the order in which the loop asks. Private names of Flower 1.41 are used here and nowhere else; a test runs
them against the pinned version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED_EXCEPTION = 2
"""Flower's error code for a ClientApp that raised."""


class InProcessGrid(Grid):
    """One node per client, numbered from 1 in the order of ``clients``; ``node_config["client"]`` holds the name.

    An ``Exception`` in the ClientApp becomes an error reply, as Flower does it; ``KeyboardInterrupt`` passes through.
    """

    def __init__(self, app: ClientApp, clients: Sequence[str]) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {node: self._context(node, name) for node, name in enumerate(clients, start=1)}
        self._waiting: dict[str, Message] = {}
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = 1

    @staticmethod
    def _context(node: int, name: str) -> Context:
        config: UserConfig = {"client": name}
        return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})

    def set_run(self, run: Run) -> None:
        """Take another run's facts."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's facts."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in order."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, in order."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; each is worked on when its reply is pulled."""
        identities = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self._waiting[message.metadata.message_id] = message
            identities.append(message.metadata.message_id)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages; each reply is given once."""
        return [self._answer(self._waiting.pop(identity)) for identity in message_ids if identity in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # what a ClientApp raises is an error reply, as in Flower's own runtime
            self.last_error = error
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)

    last_error: Exception | None = None
    """The last exception of a ClientApp: with it a simulation can say what a deployment would only log."""
