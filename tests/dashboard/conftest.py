import os
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

from made_runs import TOKEN, Coordinator

from common.pages.access import Token, Viewer
from common.pages.serving import TokenDoor
from server.dashboard.doors import ByToken

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def coordinator(tmp_path):
    made = Coordinator(tmp_path / "coordinator")
    yield made
    made.close()


@pytest.fixture
def two_runs(coordinator):
    """Run a: clinics a and c, two rounds, one failure, two refusals, still worked on; run b: clinic b alone, over."""
    one = coordinator.run("a" * 16, {"clinic-a": 4000, "clinic-c": 2000}).start()
    one.round(1, score=0.4, clinic_c="timeout")
    one.round(2, score=0.55, clinic_a="given-back", clinic_c="refused")
    other = coordinator.run("b" * 16, {"clinic-b": 3000}, rounds=2).start()
    other.round(1)
    other.round(2)
    other.finish()
    yield one, other
    one.leave()


@pytest.fixture
def by_token():
    return ByToken(TokenDoor(Token(TOKEN), Viewer("auditor")))


@pytest.fixture(scope="session")
def chromium():
    """Debian's chromium; where it is not installed the tests are skipped, unless it was said to be there."""
    if not CHROMIUM.exists():
        if os.environ.get("CLOISTER_BROWSER") == "required":
            pytest.fail(f"{CHROMIUM} is missing, and CLOISTER_BROWSER=required says that it must not be")
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, timeout=120_000)
        yield browser
        browser.close()
