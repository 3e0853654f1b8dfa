"""A JSON log is written for strangers: fixed fields, no words of an error, nothing that depends on a record."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import logs
from common.errors import InvalidInput, Unavailable
from common.text import MOST_LINE, shown
from deploy.commands import logs as options

SECRET = "patient 17 has gout"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stream(monkeypatch):
    """What is logged during the test; the process's logging is left as it was found."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    theirs = logging.getLogger("transformers").level
    root, levels = logging.getLogger(), {room: logging.getLogger(room).level for room in logs.ROOMS}
    before = list(root.handlers)
    yield io.StringIO()
    root.handlers[:] = before
    logging.captureWarnings(False)
    for room, level in levels.items():
        logging.getLogger(room).setLevel(level)
    options.begin("text", level=logging.WARNING)
    root.handlers[:] = before
    logging.getLogger("transformers").setLevel(theirs)


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_four_keys_and_what_is_known_of_the_list(stream):
    logs.configure("json", stream=stream)
    extra = {"run": "a1", "round": 3, "client": "clinic-a", "gradient_norm": 0.7}
    logging.getLogger("server.rounds").info("round %d ended", 3, extra=extra)
    (line,) = lines(stream)
    assert list(line) == ["time", "level", "logger", "message", "run", "round", "client"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["logger"], line["message"]) == ("info", "server.rounds", "round 3 ended")


WARNED = """
import sys, warnings
from deploy.commands.logs import begin
begin("json", holds_records=sys.argv[1] == "records")
warnings.warn("overflow at patient 17", RuntimeWarning, stacklevel=1)
import numpy as np
np.array([3e38], np.float32) * np.float32(10)
"""


@pytest.mark.parametrize("holds", ["records", "nothing"])
def test_a_warning_of_pythons_is_no_line_beside_the_json_log(holds):
    """numpy says when a number overflows: where there are records, one of them caused it."""
    done = subprocess.run([sys.executable, "-c", WARNED, holds], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in done.stderr.splitlines()]  # every line is an object
    assert [line["logger"] for line in written] == ([] if holds == "records" else ["py.warnings"] * 2)


def test_a_field_outside_the_list_cannot_be_written():
    with pytest.raises(KeyError, match="gradient_norm"):
        logs.as_line("info", "x", "y", now=0.0, gradient_norm=0.7)


@given(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=True, allow_infinity=True), max_size=3))
def test_every_event_is_one_line_that_any_json_reader_takes(message, epsilon):
    line = logs.as_line("info", "server", message, now=1.0, epsilon=epsilon)
    assert "\n" not in line

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(line, parse_constant=refuse)["message"] == shown(message, MOST_LINE)


def test_an_error_is_told_by_type_and_place_and_never_by_its_words(stream):
    logs.configure("json", stream=stream)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("client.trainer").exception("training failed")
    (line,) = lines(stream)
    assert SECRET not in stream.getvalue()
    assert line["exception"]["type"] == "ValueError"
    assert line["exception"]["at"][-1].startswith("tests/logs/test_logs.py:")


def test_the_text_log_has_the_words_for_the_people_on_the_machine(stream):
    logs.configure("text", stream=stream)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("client.trainer").exception("training failed")
    assert SECRET in stream.getvalue()


@pytest.mark.parametrize("name", ["client.engine.engine", "client.data.rows", "client.engine"])
def test_what_can_depend_on_a_record_is_in_no_json_log(stream, name):
    logs.configure("json", stream=stream)
    logging.getLogger(name).error(SECRET)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("holds_records", [True, False])
def test_where_records_are_no_library_is_quoted(stream, holds_records):
    logs.configure("json", stream=stream, holds_records=holds_records)
    # Not transformers: once it is loaded, it has a handler of its own and the root logger hears nothing of it.
    logging.getLogger("library").warning("Token indices sequence length is longer than 512 (612 > 512)")
    logging.getLogger("library").info("chatter")
    assert len(lines(stream)) == (0 if holds_records else 1)


def test_configured_twice_writes_once(stream):
    logs.configure("json", stream=stream)
    logs.configure("json", stream=stream)
    logging.getLogger("server").info("once")
    assert len(lines(stream)) == 1


def test_a_wrong_setting_is_told_in_full_unless_it_may_quote_a_record(stream, capsys):
    for holds_records in (False, True):
        options.begin("json", holds_records=holds_records)
        assert options.report(InvalidInput(f"row 3: {SECRET}"))
        assert options.report(Unavailable("no route to c:1"))
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["exit_code"] for line in found] == [2, 7, 2, 7]
    assert SECRET in found[0]["message"]
    assert SECRET not in found[2]["message"]
    assert "no route" in found[3]["message"]


def test_in_a_text_log_the_command_tells_its_error_itself(stream):
    options.begin("text")
    assert not options.report(InvalidInput("x"))


def test_a_childs_own_line_keeps_its_fields_and_gets_the_service():
    own = logs.as_line("warning", "server.deployed", "late", now=1.0, run="r", round=2, client="a")
    found = json.loads(options.child_line("superexec", own + "\n", 5.0))
    assert found == {**json.loads(own), "service": "superexec"}
    forged = json.dumps({"time": "t", "level": "info", "logger": "x", "message": "m", "service": "accountant", "a": 1})
    assert json.loads(options.child_line("superexec", forged, 5.0)) == {
        "time": "t", "level": "info", "logger": "x", "message": "m", "service": "superexec",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "level", "message"),
    [
        ("\x1b[92mINFO \x1b[0m:      Starting Flower\n", "info", "Starting Flower"),
        ("WARNING: late\n", "warning", "late"),
        ("anything [] else\n", "info", "anything [] else"),
        ('{"half": "of a line"}\n', "info", '{"half": "of a line"}'),
        ('["a list"]\n', "info", '["a list"]'),
    ],
)
def test_a_childs_other_lines_become_lines_with_the_level_they_begin_with(printed, level, message):
    found = json.loads(options.child_line("superlink", printed, 5.0))
    assert (found["level"], found["message"], found["service"]) == (level, message, "superlink")


def test_a_library_with_a_handler_of_its_own_says_nothing_beside_records(stream, monkeypatch, capfd):
    """transformers tells the length of a long record on standard error, whatever the root logger's filters say."""
    from transformers.utils import logging as theirs

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    level = theirs.get_verbosity()
    try:
        words = theirs.get_logger("transformers.tokenization_utils_base")
        options.begin("json", holds_records=True)
        words.warning("Token indices sequence length is longer than the maximum for this model (1234 > 512)")
        theirs._reset_library_root_logger()  # as when it is loaded only now
        theirs.get_logger("transformers.tokenization_utils_base").warning("1234 > 512")
        assert "1234" not in capfd.readouterr().err
    finally:
        theirs.set_verbosity(level)


def test_a_fault_is_told_without_its_words(stream, monkeypatch):
    options.begin("json", holds_records=True)
    logs.configure("json", holds_records=True, stream=stream)
    with pytest.raises(KeyError) as found:
        raise KeyError(SECRET)
    assert options.report_fault(found.value)
    (line,) = lines(stream)
    assert line["level"] == "critical"
    assert line["exit_code"] == 1
    assert line["exception"]["type"] == "KeyError"
    assert SECRET not in stream.getvalue()
    options.begin("text", level=logging.WARNING)
    assert not options.report_fault(KeyError(SECRET))
