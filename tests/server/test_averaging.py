"""The average of the last half of the rounds is scored and saved; what is trained on stays the raw iterate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput
from server import checkpoint as checkpoints
from server.averaging import TailAverage

values = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9)


def adapter(value) -> dict:
    return {"x": np.full(3, value, np.float32)}


@given(values)
def test_the_average_is_numpys_mean_of_the_last_half(iterates):
    average = TailAverage("tail", len(iterates))
    for server_round, value in enumerate(iterates, start=1):
        average.add(server_round, adapter(value))
    expected = np.mean(np.asarray(iterates, np.float64)[len(iterates) // 2 :])
    np.testing.assert_allclose(average.released(adapter(iterates[-1]))["x"], expected, rtol=1e-6, atol=1e-5)
    assert average.released(adapter(0))["x"].dtype == np.float32


def test_before_the_tail_and_without_averaging_the_newest_is_released():
    early = TailAverage("tail", 10)
    early.add(5, adapter(7))
    assert early.released(adapter(9))["x"][0] == 9
    assert early.state() == {}
    none = TailAverage("none", 2)
    none.add(2, adapter(7))
    assert none.released(adapter(9))["x"][0] == 9


def test_an_average_goes_on_from_its_state():
    whole, first, second = (TailAverage("tail", 6) for _ in range(3))
    for server_round in range(1, 7):
        whole.add(server_round, adapter(0.1 * server_round))
        (first if server_round < 5 else second).add(server_round, adapter(0.1 * server_round))
        if server_round == 4:
            second.restore(first.state())
    np.testing.assert_array_equal(whole.released(adapter(0))["x"], second.released(adapter(0))["x"])


def test_an_unknown_kind_is_refused():
    with pytest.raises(InvalidInput, match="none or tail"):
        TailAverage("ema", 3)


class Score:
    score = loss = 0.0


def test_scores_and_result_are_of_the_average_and_clients_train_on_the_iterate(federation, trainer):
    scored, one = [], trainer("a")
    fed = federation([one], rounds=4, averaging="tail")

    def evaluate(found):
        scored.append(float(found["other.lora_B"][0]))
        return Score()

    done = fed.loop(evaluate=evaluate).run()
    assert scored == [0.0, 0.5, 1.0, 1.5, 1.75], "rounds 3 and 4 stand at 1.5 and 2.0"
    assert [float(request.adapter["other.lora_B"][0]) for request in one.seen] == [0.0, 0.5, 1.0, 1.5]
    np.testing.assert_array_equal(done.adapter["other.lora_B"], np.float32(1.75))


@pytest.mark.parametrize("killed_at", [2, 3, 4, 5])
def test_a_killed_run_ends_with_the_same_average(federation, trainer, monkeypatch, killed_at):
    fed = federation([trainer("a")], rounds=4, averaging="tail")
    real, calls = checkpoints.save, []

    def deadly(*arguments):
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", deadly)
        with pytest.raises(KeyboardInterrupt):
            fed.loop().run()
    np.testing.assert_array_equal(fed.loop().run().adapter["other.lora_B"], np.float32(1.75))


def test_a_finished_run_gives_its_average_again(federation, trainer):
    fed = federation([trainer("a")], rounds=4, averaging="tail")
    fed.loop().run()
    np.testing.assert_array_equal(fed.loop().run().adapter["other.lora_B"], np.float32(1.75))
