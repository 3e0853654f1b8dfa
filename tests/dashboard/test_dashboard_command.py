"""``cloister dashboard`` as a process: where it listens, whom it lets in, how it ends, and what it refuses to start."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from made_runs import until
from typer.testing import CliRunner

from deploy.cli import app
from deploy.probe import main as probe

ROOT = Path(__file__).parents[2]
RUN_A = "a" * 16


class Running:
    """The command with its output in a file."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "deploy.cli", "dashboard", str(folder), *options]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)

    def said(self) -> str:
        return self.log.read_text()

    def until_up(self) -> str:
        until(lambda: "(Ctrl-C ends it)" in self.said() or self.process.poll() is not None, 240)
        assert self.process.poll() is None, self.said()
        return self.said()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@pytest.fixture
def start(two_runs, coordinator, tmp_path):
    begun = []

    def begin(*options: str) -> Running:
        begun.append(Running(coordinator.home, tmp_path / f"log-{len(begun)}", *options))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait(timeout=60)


def test_it_listens_on_loopback_behind_a_token_that_only_its_owner_can_read(start, coordinator):
    running = start("--port", "0")
    said = running.until_up()
    address = re.search(r"http://127\.0\.0\.1:\d+/", said)[0]
    file = coordinator.home / "keys" / "dashboard.token"
    assert str(file) in said
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text().strip()
    assert token not in said  # a log is for more people than the token
    assert httpx.get(address).status_code == 401
    bearer = {"authorization": f"Bearer {token}"}
    assert RUN_A in httpx.get(address, headers=bearer).text
    until(lambda: httpx.get(f"{address}readyz").status_code == 200)
    assert "cloister_epsilon_spent" in httpx.get(f"{address}metrics", headers=bearer).text
    assert "torch" not in _modules(running.process.pid)
    running.end()


def _modules(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_on_the_proxys_socket_there_is_no_token_and_the_probe_finds_it_well(start, tmp_path, capsys):
    path = tmp_path / "d.sock"
    running = start("--proxy-socket", str(path))
    running.until_up()
    assert path.stat().st_mode & 0o777 == 0o600
    until(lambda: probe(["socket", str(path), "/healthz"]) == 0, 120)  # a busy machine answers late
    assert probe(["socket", str(path), "/"]) == 1
    assert "401" in capsys.readouterr().err
    assert probe(["socket", str(tmp_path / "nothing"), "/healthz"]) == 1
    running.end()
    assert not path.exists()


def test_an_open_stream_does_not_keep_it_from_ending(start, coordinator):
    running = start("--port", "0")
    address = re.search(r"http://127\.0\.0\.1:\d+/", running.until_up())[0]
    token = (coordinator.home / "keys" / "dashboard.token").read_text().strip()
    with httpx.stream("GET", f"{address}events", headers={"authorization": f"Bearer {token}"}, timeout=60) as stream:
        assert next(stream.iter_lines()).startswith("retry")
        running.end()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "a token must not cross a network in plain text"),
        (["--tls-certificate", "a.crt"], 2, "go together"),
        (["--tls-certificate", "a.crt", "--tls-key", "a.key"], 2, "a.crt: cannot be read"),
        (["--revoked", "list.json"], 2, "it needs --proxy-socket"),
        (["--proxy-socket", "s.sock", "--token-file", "t"], 2, "goes without token and TLS"),
        (["--proxy-socket", "s.sock", "--revoked", "missing.json"], 2, "the revocation list cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_way_out(two_runs, coordinator, options, code, words):
    done = CliRunner().invoke(app, ["dashboard", str(coordinator.home), *options])
    assert done.exception is not None
    assert getattr(done.exception, "exit_code", None) == code, done.exception
    assert words in str(done.exception)


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_COORDINATOR", raising=False)
    assert "name the folder to show" in str(CliRunner().invoke(app, ["dashboard"]).exception)
    (tmp_path / "empty").mkdir()
    assert "neither a coordinator's folder nor a run's" in str(
        CliRunner().invoke(app, ["dashboard", "empty"]).exception
    )


def test_every_option_is_documented():
    page = (ROOT / "docs" / "dashboard.md").read_text("utf-8")
    words = CliRunner().invoke(app, ["dashboard", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = set(re.findall(r"--[a-z-]+", words)) - {"--help"}
    assert len(options) >= 9
    assert {option for option in options if f"`{option}`" not in page} == set()
