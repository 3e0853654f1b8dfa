"""No error's words leave an organisation: Flower and gRPC would send them on, and they could say anything."""

import json

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.relay import build_relay, to_record
from client.trainer_service import RemoteTrainer, serve
from common.attestation import PartRequest
from common.errors import CloisterError, InvalidInput
from common.history import ListRequest
from common.messages import Envelope
from common.signing import SigningKey
from deploy.simulation.inprocess_grid import InProcessGrid
from server.exchange import Exchange, Failure

SECRET = "patient 17 has gout"
KEY = SigningKey.generate()


class Careless:
    """A trainer, or the way to it, that fails with a record in its words."""

    def __init__(self, error):
        self._error = error

    def describe(self):
        raise self._error

    train = signed_list = signed_part = lambda self, request: self.describe()


QUESTIONS = {
    "query.describe": lambda parties: {},
    "query.list": lambda parties: vars(ListRequest.sign(KEY, "clinic-a")),
    "query.part": lambda parties: PartRequest.sign(KEY, "run", "clinic-a", "notes", Envelope(())).to_json(),
    "query.part, malformed": lambda parties: {"run_id": SECRET},
    "train": lambda parties: parties.request().header(),
    "train, malformed": lambda parties: {"plan": SECRET},
}


@pytest.mark.parametrize("error", [ValueError(SECRET), InvalidInput(SECRET), MemoryError(SECRET), KeyError(SECRET)])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_whatever_fails_behind_the_relay_is_one_word_outside(kind, error, parties, caplog):
    app = build_relay(lambda context: Careless(error))
    content = RecordDict({"request": ConfigRecord({"json": json.dumps(QUESTIONS[kind](parties))})})
    content["adapter"] = to_record(parties.request().adapter)
    grid = InProcessGrid(app, ["clinic-a"])  # it makes an exception an error with its words, as Flower does
    (asked,) = grid.push_messages([Message(content, dst_node_id=1, message_type=kind.partition(",")[0])])
    (answer,) = grid.pull_messages([asked])
    assert not answer.has_error()
    assert {name: dict(record) for name, record in answer.content.config_records.items()} == {
        "status": {"json": '{"code": "unavailable"}'}
    }
    assert SECRET not in repr(answer.content)
    assert SECRET not in caplog.text


def test_a_coordinator_that_asks_such_a_node_gets_a_failure_and_no_word():
    app = build_relay(lambda context: Careless(ValueError(SECRET)))
    exchange = Exchange(InProcessGrid(app, ["clinic-a"]))
    with pytest.raises(CloisterError) as caught:
        exchange.describe(1, 5.0)
    assert SECRET not in str(caught.value)
    exchange._nodes["clinic-a"] = next(iter(exchange._grid.get_node_ids()))
    ((_, answer),) = exchange.lists({"clinic-a": ListRequest.sign(KEY, "clinic-a")}, 5.0)
    assert isinstance(answer, Failure)
    assert "unavailable" in answer.reason


def test_a_trainers_service_says_no_word_of_an_error_either(tmp_path, parties):
    address = f"unix:{tmp_path}/trainer.sock"
    server = serve(Careless(ValueError(SECRET)), address)
    remote = RemoteTrainer(address, timeout_s=20)
    try:
        with pytest.raises(CloisterError) as caught:
            remote.describe()
        assert SECRET not in str(caught.value)
        assert str(remote.train(parties.request()).code) == "unavailable"
    finally:
        remote.close()
        server.stop(None).wait()
