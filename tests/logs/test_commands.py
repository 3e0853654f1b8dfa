"""``--log-format json`` on the commands that run long: every line of standard error is an object with fixed keys."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import typer

from client.progress import Progress, WatchedTrainer
from common import logs
from common.messages import RefusalReason, Status, StatusCode
from common.text import is_visible
from deploy.cli import app, main
from deploy.commands import logs as options
from deploy.commands.logs import child_listener
from deploy.running.processes import Service, Supervisor
from server.accountant import Outcome
from server.deployed import Journalist, RunFolder

ROOT = Path(__file__).resolve().parents[2]
LONG_RUNNING = (
    ("simulate",), ("accountant", "serve"), ("coordinator", "serve"), ("client", "trainer"), ("client", "join"),
    ("client", "dashboard"), ("dashboard",),
)  # fmt: skip
KEYS = {"time", "level", "logger", "message", *logs.FIELDS}


def only_objects(text):
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) and set(line) <= KEYS for line in found), text
    return found


@pytest.mark.parametrize("words", LONG_RUNNING, ids=" ".join)
def test_every_long_running_command_takes_it(words):
    command = typer.main.get_command(app)
    for word in words:
        assert isinstance(command, click.Group) or hasattr(command, "commands")
        command = command.commands[word]
    option = next(one for one in command.params if "--log-format" in one.opts)
    assert option.envvar == logs.VARIABLE
    assert option.help


@pytest.mark.slow  # starts a process
def test_an_accountant_in_json_says_nothing_on_standard_output(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "deploy.cli", "accountant", "serve", "--insecure", "--ledger"]
    arguments = [str(tmp_path / "l.sqlite"), "--key", str(tmp_path / "key"), "--address", f"unix:{tmp_path}/s"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, logs.VARIABLE: "json", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        first = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, first + rest
    assert out == ""
    assert "listens on" in only_objects(first + rest)[0]["message"]


@pytest.fixture
def own_logging():
    """The process's logging, left as it was found."""
    root, levels = logging.getLogger(), {room: logging.getLogger(room).level for room in logs.ROOMS}
    before = list(root.handlers)
    yield
    options.begin("text", level=logging.WARNING)
    root.handlers[:] = before
    for room, level in levels.items():
        logging.getLogger(room).setLevel(level)


def test_a_wrong_setting_is_one_line_and_its_exit_code(tmp_path, monkeypatch, capsys, own_logging):
    monkeypatch.setattr(sys, "argv", ["cloister", "coordinator", "serve", "--log-format", "json", "--folder", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    found = capsys.readouterr()
    (line,) = only_objects(found.err)
    assert (line["level"], line["exit_code"]) == ("error", 2)
    assert "--tls-certificate" in line["message"]
    assert found.out == ""


def test_what_children_print_is_heard_line_by_line(tmp_path):
    heard, enough = [], threading.Event()

    def hear(service, line):
        heard.append((service, line))
        if len(heard) == 3:
            enough.set()

    code = "import sys; print('one'); print('INFO : two', file=sys.stderr); print('three'); sys.stdout.flush(); "
    child = Service("child", [sys.executable, "-uc", code + "import time; time.sleep(60)"])
    supervisor = Supervisor([child], hear=hear)
    threading.Thread(target=lambda: (enough.wait(60), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    supervisor.run()
    assert heard == [("child", "one\n"), ("child", "INFO : two\n"), ("child", "three\n")]


def test_what_strangers_write_into_flowers_log_reaches_no_terminal_as_it_came(capsys):
    """A SuperLink logs what it was sent: here a title for the terminal's window, and a line written over another."""
    hostile = "\x1b[92mINFO\x1b[0m : node \x1b]0;owned\x07 left\rERROR : all is lost\n"
    child_listener("text")("superlink", hostile)
    said = capsys.readouterr().out
    assert said.endswith("all is lost\n")
    assert all(is_visible(line) for line in said.split("\n"))
    assert child_listener("json")("superlink", hostile) is None
    (line,) = only_objects(capsys.readouterr().err)
    assert is_visible(line["message"])


def test_a_runs_own_process_writes_events_with_run_round_and_client(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(logs.VARIABLE, "json")
    (tmp_path / ("ab" * 8)).mkdir()
    folder = RunFolder(tmp_path / ("ab" * 8), tmp_path)
    journalist = Journalist(folder, 5, lambda: 0.125)
    journalist.round_started(2, ("clinic-a", "clinic-b"))
    journalist.answered(2, "clinic-b", Outcome.TIMEOUT, "no answer")
    journalist.round_ended({"round": 2, "score": None, "loss": 1.5, "epsilon": {"clinic-a": 0.5}, "seconds": 3.0})
    begun, answered, ended = only_objects(capsys.readouterr().out)
    assert begun["run"] == "ab" * 8
    assert begun["clients"] == ["clinic-a", "clinic-b"]
    assert (answered["level"], answered["round"], answered["client"]) == ("warning", 2, "clinic-b")
    assert (answered["outcome"], answered["reason"]) == ("timeout", "no answer")
    assert ended["epsilon"] == {"clinic-a": 0.5}
    assert "round 2/5: clinic-b: timeout: no answer" in (folder.path / "run.log").read_text()
    folder.note("finished")
    assert folder.state()["ledger_seconds"] == 0.125


def test_in_text_the_same_process_prints_what_it_always_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    folder = RunFolder(tmp_path, tmp_path)
    folder.say("round 1/5: sent to a", round=1)
    assert capsys.readouterr().out == "round 1/5: sent to a\n"


class _Says:
    """A trainer that gives one answer."""

    def __init__(self, answer):
        self.answer = answer

    def train(self, request):
        return self.answer


class _Plan:
    run_id, server_round, local_steps = "run-1" + "x" * 100, 3, 4


class _Request:
    plan = _Plan()


def test_a_trainers_log_and_counters_tell_each_request_and_no_duration(caplog):
    progress = Progress(clock=lambda: 7.0)
    with caplog.at_level(logging.INFO, logger="client.progress"):
        WatchedTrainer(_Says(Status(StatusCode.LOST)), progress).train(_Request())
    assert [record.getMessage() for record in caplog.records] == ["a request has come", "answered: lost"]
    assert {len(record.run) for record in caplog.records} == {64}
    assert not hasattr(caplog.records[-1], "seconds")
    progress.tell(_Request(), "refused", str(RefusalReason.SIGNATURE))
    found = progress.read()
    assert found["answers"] == {"lost": 1, "refused": 1}
    assert found["refusals"] == [{"time": 7.0, "run_id": _Plan.run_id[:64], "round": 3, "reason": "signature"}]


def test_what_strangers_cause_does_not_grow_without_end():
    progress = Progress()
    for _ in range(500):
        progress.tell(_Request(), "refused", "signature")
    found = progress.read()
    assert found["answers"]["refused"] == 500
    assert len(found["refusals"]) == 50


def test_no_url_with_a_token_can_be_a_field():
    assert "url" not in logs.FIELDS
    assert options.announcer("text") is typer.echo
