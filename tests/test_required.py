"""CLOISTER_REQUIRED turns the skips that it names into failures, and no others; every real skip is recognised."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# A small suite of its own, which play() runs: its skips are what is under test.
MADE = """
import pytest

@pytest.mark.skipif(True, reason="nginx is not installed (apt-get install nginx-light)")
def test_a_mark():
    raise AssertionError

@pytest.fixture(scope="module")
def server():
    pytest.skip("PostgreSQL is not installed (no initdb in /usr/lib/postgresql/*/bin or on the PATH)")

def test_a_fixture(server):
    raise AssertionError

def test_a_body():
    pytest.skip("/usr/bin/chromium is not installed (apt-get install chromium)")

def test_another_reason():
    pytest.skip("the real data is not there")

def test_an_expected_failure(request):
    request.applymarker(pytest.mark.xfail(reason="nginx"))
    raise AssertionError
"""


def play(folder, value):
    (folder / "test_made.py").write_text(MADE)
    variables = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "CLOISTER_REQUIRED": value,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", folder, "-p", "required", "-q", "-rsfE"]
    command += ["-p", "no:cacheprovider", "test_made.py"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    failed = set(re.findall(r"(?m)^(?:FAILED|ERROR) test_made.py::(\w+)", done.stdout))
    return done, failed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", set()),
        ("nginx", {"test_a_mark"}),
        ("chromium nginx postgresql", {"test_a_mark", "test_a_fixture", "test_a_body"}),
    ],
)
def test_a_skip_for_want_of_what_is_required_is_a_failure(tmp_path, value, expected):
    done, failed = play(tmp_path, value)
    assert failed == expected, done.stdout + done.stderr
    assert (done.returncode == 0) == (not expected)
    assert re.search(rf"{4 - len(expected)} skipped, 1 xfailed", done.stdout), done.stdout


def test_a_name_that_nothing_needs_is_refused(tmp_path):
    done, _ = play(tmp_path, "nginx docker")
    assert done.returncode == 4
    assert "CLOISTER_REQUIRED: docker is none of chromium, nginx, postgresql" in done.stderr


def test_every_program_that_a_test_may_skip_for_can_be_required():
    """A reason of another wording would slip through."""
    reasons, pattern = [], r'(?:skip\(|reason=)f?"([^"]*(?:is not installed|refuses root)[^"]*)"'
    for path in TESTS.rglob("*.py"):
        if path != Path(__file__):
            reasons += re.findall(pattern, path.read_text())
    recognised = ("chromium", "nginx", "postgresql", "docker compose")
    assert len(reasons) >= 5
    assert [one for one in reasons if not any(word in one.lower() for word in recognised)] == []
