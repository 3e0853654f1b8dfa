"""What comes back over Flower's grid: read if it fits, an error otherwise, and never an exception."""

import io
import json
import re
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client.relay import to_arrays, to_record
from common.errors import InvalidInput, Unavailable
from common.messages import (
    Description,
    Envelope,
    Plan,
    RefusalReason,
    Reply,
    Reservation,
    SignedReservation,
    Status,
    StatusCode,
    TrainRequest,
    adapter_hash,
)
from common.privacy import SampledGaussian
from common.release import own_version
from deploy.simulation.inprocess_grid import InProcessGrid
from server.accountant import Outcome
from server.aggregation import WeightedMean
from server.deployed import provisioned_keys
from server.exchange import Exchange, Failure

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1)
ADAPTER = {"z.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.weight": np.ones(2, np.float32)}
GOOD = {"reservation_id": "r", "ledger_head": "h"}


def request(name="a") -> TrainRequest:
    plan = Plan(
        "run", 1, name, name, 1, 0, EVENT, 1, 1.0, 10.0, 1000, "sgd", 0.1, "ffa", "b", adapter_hash(ADAPTER),
        Envelope((EVENT,)),
    )  # fmt: skip
    signed = SignedReservation(Reservation("r" + name, "run", 1, name, name, 1, EVENT), "s", "h", "t")
    return TrainRequest(plan, "signature", signed, ADAPTER)


def answer(app, timeout=5.0, **options):
    """The one client's answer to one request."""
    exchange = Exchange(InProcessGrid(app, ["a"]), **options)
    exchange.describe(1, 5.0)
    return dict(exchange.train({"a": request()}, timeout))["a"]


def test_a_request_reaches_the_trainer_and_its_reply_comes_back_unchanged(federation, trainer):
    one = trainer("a")
    fed = federation([one])
    found = dict(fed.exchange().train({"a": request()}, 5.0))["a"]
    assert one.seen[0].header() == request().header()
    assert list(one.seen[0].adapter) == list(ADAPTER)
    for name, array in ADAPTER.items():
        np.testing.assert_array_equal(one.seen[0].adapter[name], array)
    assert isinstance(found, Reply)
    assert found.reservation_id == "ra"


@pytest.mark.parametrize("reason", list(RefusalReason))
def test_a_refusal_comes_back_with_its_signature(federation, trainer, reason):
    one = trainer("a")
    one.behave = lambda request: one.refuse(request, reason, voiding=True)
    found = dict(federation([one]).exchange().train({"a": request()}, 5.0))["a"]
    found.check(one.key.public_key)
    assert found.reason is reason


@pytest.mark.parametrize("code", list(StatusCode))
def test_a_status_comes_back(federation, trainer, code):
    fed = federation([trainer("a", lambda request: Status(code))])
    assert dict(fed.exchange().train({"a": request()}, 5.0))["a"] == Status(code)


def test_answers_come_in_the_order_of_names_one_at_a_time(federation, trainer):
    begun = []
    trainers = [trainer(name) for name in ("c", "a", "b")]
    for one in trainers:
        one.behave = lambda request, one=one: (begun.append(one.name), one.ordinary(request))[1]
    exchange = federation(trainers).exchange()
    seen = []
    for name, found in exchange.train({name: request(name) for name in ("b", "c", "a")}, 5.0):
        seen.append(name)
        assert isinstance(found, Reply)
        assert begun == seen, "no client's update waits in memory while another's is read"
    assert seen == ["a", "b", "c"]


def test_the_coordinators_memory_is_flat_from_10_to_200_clients():
    """One adapter to send and one update to add, however many there are: 1 MiB each here."""
    large = {"w": np.zeros((512, 512), np.float32)}
    app = ClientApp()

    @app.query("describe")
    def describe(message, context):
        name = str(context.node_config["client"])
        own = Description(name, name, name, 1000, "b", {"w": (512, 512)}, ("w",), "i")
        return Message(RecordDict({"description": ConfigRecord({"json": json.dumps(own.to_json())})}), reply_to=message)

    @app.train()
    def train(message, context):
        reply = {"reservation_id": "r" + str(context.node_config["client"]), "ledger_head": "h"}
        content = RecordDict({"reply": ConfigRecord({"json": json.dumps(reply)}), "update": to_record(large)})
        return Message(content, reply_to=message)

    def peak(clients):
        names = [f"c{number:03d}" for number in range(clients)]
        exchange = Exchange(InProcessGrid(app, names))
        exchange.describe(clients, 60.0)
        requests = {name: replace(request(name), adapter=large) for name in names}
        mean = WeightedMean({"w": (512, 512)})
        tracemalloc.start()
        try:
            for _, answer in exchange.train(requests, 60.0):
                mean.add(answer.update, 1.0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert mean.count == clients

    peak(2)
    few, many = peak(10), peak(200)
    assert many - few < 3 * 2**20, f"{few / 2**20:.1f} MiB with 10 clients, {many / 2**20:.1f} MiB with 200"


def test_an_exception_in_a_trainer_is_that_clients_error_alone(federation, trainer):
    def fails(request):
        raise RuntimeError("out of memory")

    fed = federation([trainer("a", fails), trainer("b")])
    found = dict(fed.exchange().train({"a": request("a"), "b": request("b")}, 5.0))
    assert found["a"] == Status(StatusCode.UNAVAILABLE)  # in one word: the error's own may quote a record
    assert isinstance(found["b"], Reply)


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def flower_array(data: bytes, shape=(2,), dtype="float32") -> Array:
    return Array(dtype=dtype, shape=list(shape), stype="numpy.ndarray", data=data)


HOSTILE_ARRAYS = {
    "not numpy at all": b"\x00" * 40,
    "empty": b"",
    "a pickle": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "cut short": npy(np.ones(1000, np.float32))[:200],
    "a header that claims a terabyte": npy(np.ones(2, np.float32)).replace(b"(2,), }", b"(274877906944,), }")[:300],
    "a header that is code": b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').abort()".ljust(64) + b"\n",
}


@pytest.mark.parametrize("data", list(HOSTILE_ARRAYS.values()), ids=list(HOSTILE_ARRAYS))
def test_arrays_that_cannot_be_read_are_an_error(raw_app, as_reply, data):
    app = raw_app(lambda message: as_reply(GOOD, ArrayRecord({"a.weight": flower_array(data)})))
    found = answer(app)
    assert isinstance(found, Failure)
    assert found.outcome is Outcome.ERROR


HOSTILE_TEXTS = {
    "not json": "{",
    "nested without end": "[" * 200_000,
    "a number of many digits": "1" * 10_000,
    "a list": "[]",
    "nothing in it": "{}",
    "numbers for texts": json.dumps({"reservation_id": 5, "ledger_head": []}),
    "half a key": json.dumps({"reservation_id": "r"}),
}


@pytest.mark.parametrize("text", list(HOSTILE_TEXTS.values()), ids=list(HOSTILE_TEXTS))
@pytest.mark.parametrize("kind", ["reply", "refusal", "status"])
def test_texts_that_cannot_be_read_are_an_error(raw_app, kind, text):
    def make(message):
        return RecordDict({kind: ConfigRecord({"json": text}), "update": to_record(ADAPTER)})

    found = answer(raw_app(make))
    assert isinstance(found, Failure)
    assert found.outcome is Outcome.ERROR


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"note": ConfigRecord({"json": "free text about a patient"})}),
        RecordDict({"reply": ConfigRecord({"text": "{}"})}),
        RecordDict({"reply": ConfigRecord({"json": json.dumps(GOOD)})}),
        RecordDict({"status": ConfigRecord({"json": json.dumps({"code": "free text"})})}),
    ],
    ids=["empty", "a fifth kind", "no json", "no update", "an unknown code"],
)
def test_an_answer_of_another_kind_is_an_error(raw_app, content):
    found = answer(raw_app(lambda message: content))
    assert isinstance(found, Failure)
    assert found.outcome is Outcome.ERROR


class Deaf(InProcessGrid):
    """A grid on which the named client's answers never arrive."""

    deaf_to = 1

    def pull_messages(self, message_ids):
        known = [i for i in message_ids if self._waiting.get(i) is None or not self._is_deaf(i)]
        return super().pull_messages(known)

    def _is_deaf(self, identity):
        message = self._waiting[identity]
        return message.metadata.message_type == "train" and message.metadata.dst_node_id == self.deaf_to


def test_a_client_that_does_not_answer_times_out_and_the_others_are_read(federation, trainer):
    fed = federation([trainer("a"), trainer("b")])
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    exchange = Exchange(Deaf(fed.app, ["a", "b"]), poll_s=1.0, clock=lambda: clock[0], sleep=sleep)
    exchange.describe(2, 5.0)
    found = dict(exchange.train({"a": request("a"), "b": request("b")}, 30.0))
    assert found["a"].outcome is Outcome.TIMEOUT
    assert isinstance(found["b"], Reply)
    assert 30.0 <= clock[0] <= 33.0


def test_too_few_clients_are_an_error_in_time(federation, trainer):
    fed = federation([trainer("a")])
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    exchange = Exchange(InProcessGrid(fed.app, ["a"]), clock=lambda: clock[0], sleep=sleep)
    with pytest.raises(Unavailable, match="only 1 of 2"):
        exchange.describe(2, 10.0)


def test_two_nodes_of_one_name_are_an_error(federation, trainer):
    fed = federation([trainer("a"), trainer("b")])
    fed.trainers["b"] = fed.trainers["a"]
    with pytest.raises(Unavailable, match="two nodes"):
        fed.exchange()


def test_arrays_cross_the_relay_bit_for_bit():
    values = {"x": np.array([0.0, -0.0, 1e-45, 3.4e38, np.nan], np.float32)}
    found = to_arrays(to_record(values))
    assert found["x"].tobytes() == values["x"].tobytes()


def test_the_grid_gives_each_reply_once(federation, trainer):
    fed = federation([trainer("a")])
    exchange = fed.exchange()
    start = time.monotonic()
    assert isinstance(dict(exchange.train({"a": request()}, 5.0))["a"], Reply)
    assert len(fed.trainers["a"].seen) == 1
    assert time.monotonic() - start < 30


def test_a_node_without_the_key_provisioned_for_its_name_is_as_good_as_absent(federation, trainer):
    fed = federation([trainer("a"), trainer("b")])
    keys = {name: {fed.trainers[name].describe().public_key} for name in ("a", "b")}
    found = Exchange(InProcessGrid(fed.app, ["a", "b"])).describe(2, 5.0, provisioned=keys)
    assert [one.client for one in found] == ["a", "b"]
    swapped = {"a": keys["b"], "b": keys["b"]}
    exchange = Exchange(InProcessGrid(fed.app, ["a", "b"]))
    with pytest.raises(Unavailable, match="only 1 of 2 clients described themselves in time, with a key that was prov"):
        exchange.describe(2, 5.0, provisioned=swapped)
    with pytest.raises(Unavailable, match=r"'a' has no key provisioned for that name \('cloister provision"):
        exchange.describe(2, 5.0, provisioned=swapped)
    assert [one.client for one in exchange.describe(1, 5.0, provisioned=swapped)] == ["b"]
    with pytest.raises(Unavailable, match="only 0 of 1"):
        exchange.describe(1, 5.0, provisioned={})


def saying(change):
    """The relay's app of one node ``a`` whose description is changed on its way, and says who was asked to train."""
    app, asked = ClientApp(), []
    own = Description("a", "a", "key", 1000, "b" * 64, {"w": (2,)}, ("w",), "i" * 64).to_json()

    @app.query("describe")
    def describe(message, context):
        return Message(RecordDict({"description": ConfigRecord({"json": json.dumps(change(own))})}), reply_to=message)

    @app.train()
    def train(message, context):
        asked.append(message)
        return Message(RecordDict(), reply_to=message)

    return app, asked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: own | {"version": "0.0.9"}, r"'a' runs version '0\.0\.9'"),
        (lambda own: own | {"version": "99.0", "something": "that this version does not know"}, r"version '99\.0'"),
        (lambda own: {name: own[name] for name in own if name != "version"}, "a version that does not say which"),
        (lambda own: own | {"version": "9" * 5000, "client": "a" * 5000}, "'a{40}' runs version '9{32}' of"),
    ],
)
def test_a_client_of_another_version_is_told_what_to_install_and_asked_nothing_more(change, says):
    app, asked = saying(change)
    mends = rf"only 0 of 1 clients.*{says}.*pip install 'cloister=={re.escape(own_version())}'"
    with pytest.raises(Unavailable, match=mends) as refused:
        Exchange(InProcessGrid(app, ["a"])).describe(1, 5.0)
    assert len(str(refused.value)) < 600
    assert asked == []


def test_a_client_that_comes_back_to_its_run_with_another_version_is_absent_and_the_message_says_why():
    app, asked = saying(lambda own: own | {"version": "0.0.9"})
    exchange = Exchange(InProcessGrid(app, ["a"]))
    exchange.recall([Description("a", "a", "key", 1000, "b" * 64, {"w": (2,)}, ("w",), "i" * 64)])
    with pytest.raises(Unavailable, match=r"absent: a\); nothing was sent or charged.*'a' runs version '0\.0\.9'"):
        exchange.await_present(["a"], 1, 0.0)
    assert asked == []


def test_keys_are_read_by_name_over_their_generations(tmp_path):
    assert provisioned_keys(tmp_path / "clients") is None
    (tmp_path / "clients").mkdir()
    assert provisioned_keys(tmp_path / "clients") == {}
    for file, key in (("st.mary.1.pub", "k1"), ("st.mary.2.pub", "k2"), ("clinic.pub", "k3")):
        (tmp_path / "clients" / file).write_text(key + "\n")
    assert provisioned_keys(tmp_path / "clients") == {"st.mary": {"k1", "k2"}, "clinic": {"k3"}}
    (tmp_path / "clients" / "bad.1.pub").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match=r"bad\.1\.pub"):
        provisioned_keys(tmp_path / "clients")
