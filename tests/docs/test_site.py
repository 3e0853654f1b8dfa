"""The site builds without a warning and without a network, and its pages ask no other host."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from blocks import ROOT

# Reads every docstring: about thirty CPU-seconds, which take their time on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site, made as ``make docs`` does where no proxy answers."""
    folder = tmp_path_factory.mktemp("site")
    recipe = (ROOT / "Makefile").read_text("utf-8")
    command = re.search(r"-m (sphinx .*?) docs docs/_build/html$", recipe, re.M)[1].replace("docs/_build", str(folder))
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "docs", str(folder / "html")],
        cwd=ROOT, env={**os.environ, **nowhere, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "html"


class Loads(HTMLParser):
    """What a browser fetches for a page without being asked."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.found += [values[name] for name in ("src", "data", "srcset") if values.get(name)]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "index", "search", "author"):
            self.found.append(values.get("href") or "")


def test_no_page_asks_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text("utf-8")
        loads = Loads()
        loads.feed(text)
        outside = [one for one in loads.found if re.match(r"(?:[a-z]+:)?//", one)]
        assert not outside, f"{page.name}: {outside}"
        assert not re.search(r"(fetch|importScripts|XMLHttpRequest|import)\(\s*[\"'](?:https?:)?//", text), page.name
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        assert not re.search(r"(@import|url\()\s*[\"']?(?:https?:)?//", text), style.name


def test_settings_commands_and_docstrings_are_on_its_pages(site):
    def page(name):
        return re.sub(r"<[^>]*>", "", (site / "reference" / f"{name}.html").read_text("utf-8"))

    from common.config import RunConfig, dashed

    assert all(dashed(name) in page("settings") for name in RunConfig.model_fields if name != "clients")
    assert "cloister certificate verify" in page("commands")
    assert "RESOURCE_EXHAUSTED" in page("exit-codes")
    for name, word in {
        "api-privacy": "PLDAccountant", "api-engine": "clipped_gradient_sum", "api-books": "verify_certificate",
        "api-contracts": "RefusalReason",
    }.items():  # fmt: skip
        assert word in page(name)
    assert "generated:" not in page("settings") + page("commands") + page("exit-codes")


def test_the_pages_are_light(site):
    sizes = {page.name: page.stat().st_size for page in site.rglob("*.html")}
    assert max(sizes.values()) < 1_000_000, sizes


def test_nothing_of_the_machine_is_in_it(site):
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text("utf-8"), page.name
