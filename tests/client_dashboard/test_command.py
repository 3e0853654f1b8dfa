"""``cloister client dashboard`` as a process: its address, its token, and what it leaves alone."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(used):
    """The trainer's settings beside the policy."""
    (used.folder / "records.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    text = 'dataset = "notes"\ndata = "records.jsonl"\nmodel = "demo"\nledger = "ledger.sqlite"\n'
    (used.folder / "trainer.toml").write_text(text + f'status = "{used.socket}"\n')
    return used


def start(organisation, *arguments):
    command = [sys.executable, "-m", "deploy.cli", "client", "dashboard", "--policy", str(organisation.policy_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, out, err


def test_it_serves_whoever_has_the_printed_address_and_logs_no_token(settings):
    process = start(settings, "--log-format", "json")
    try:
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/", url), url + process.stderr.read()
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert "clinic-a" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url[:-2] + "x/", timeout=60)
        assert refused.value.code == 403
        refused.value.close()
    finally:
        code, _, err = stop(process)
    assert code in (0, -signal.SIGTERM)
    assert url.split("/")[3] not in err
    assert [json.loads(line)["level"] for line in err.splitlines()] == ["info"], err
    request = settings.request(by=1, run_id="run-2", server_round=2, participation=1)
    assert settings.train(request), "the trainer goes on as before"


def test_a_token_file_is_made_for_its_owner_and_keeps_the_token_off_the_screen(settings):
    file = settings.folder / "token"
    process = start(settings, "--token-file", str(file))
    try:
        line = process.stdout.readline()
        assert "/TOKEN/" in line, line
        assert str(file) in line
        token = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        port = re.search(r":(\d+)/", line)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{token}/state.json", timeout=60) as answer:
            assert json.load(answer)["organisation"] == "clinic-a"
    finally:
        _, out, err = stop(process)
    assert token not in out + err


def test_a_policy_that_is_not_there_is_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "deploy.cli", "client", "dashboard", "--policy", str(tmp_path / "policy.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
