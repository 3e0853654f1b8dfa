"""A simulation seen by machines: its JSON log, and its TensorBoard files after it was stopped and went on."""

import json

import pytest

from common.config import RunConfig
from deploy.simulation.simulate import Watcher, quiet_warnings, simulate


def board(folder):
    """(tag, step) of every figure, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return sorted(
        (value.tag, event.step)
        for file in folder.glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag != "parameters/text_summary"
    )


class Stop(Exception):
    """Not an error of ours: like a kill between two rounds."""


class Stopper(Watcher):
    def round_ended(self, record):
        if record["round"] == 2:
            raise Stop


def test_tensorboard_has_every_round_once_after_a_stop(options, tmp_path):
    output = tmp_path / "run"
    settings = options(output, tensorboard=True)
    with quiet_warnings(), pytest.raises(Stop):
        simulate(RunConfig.from_mapping(settings), Stopper())
    with quiet_warnings():
        simulate(RunConfig.from_mapping(settings | {"resume": True}))
    names = ["loss", "score", "seconds", *(f"epsilon/{name}" for name in ("east", "north", "south"))]
    assert board(output / "tensorboard") == sorted((name, step) for name in names for step in range(4))


def test_a_json_log_has_one_object_per_event_and_no_count_of_records(options, tmp_path, cloister):
    done = cloister("simulate", "--json", "--log-format", "json", **options(tmp_path / "run", rounds=2))
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    events = [json.loads(line) for line in done.err.splitlines()]
    assert all(event["run"] == summary["run_id"] for event in events)
    ended = [event for event in events if event["message"] == "round ended"]
    assert [event["round"] for event in ended] == [0, 1, 2]
    assert ended[-1]["epsilon"] == summary["epsilon"]
    answered = [(event["round"], event["client"]) for event in events if event["message"] == "answered"]
    assert answered == [(n, name) for n in (1, 2) for name in ("east", "north", "south")]
    assert events[-1]["message"] == "the run is finished"
    for count in ("60", "80", "70"):  # the silos' sizes
        assert f" {count} " not in done.err


def test_an_error_is_a_json_line_too_and_quotes_no_record(options, tmp_path, cloister):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "patient 17", "completion": "gout"}\n{"prompt": 3, "completion": ["patient 17"]}\n')
    done = cloister("simulate", "--log-format", "json", **options(tmp_path / "run", data=str(bad), silos=2))
    assert done.code == 2
    line = json.loads(done.err.splitlines()[-1])
    assert (line["level"], line["exit_code"]) == ("error", 2)
    assert "patient" not in done.err + done.out
