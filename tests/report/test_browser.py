"""The report in a real browser: nothing is asked of anybody, nothing is logged, nothing stands in a reader's way."""

import shutil

import pytest

from deploy.report import write_report
from deploy.run_record import read_run

CHROMIUM = shutil.which("chromium")
pytest.importorskip("playwright", reason="needs the extra dev (playwright)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(read_run(run.folder), path)
    return path


@pytest.fixture(params=["light", "dark"])
def page(browser, file, request):
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.asked, page.said = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(file.as_uri())
    yield page
    context.close()


def test_nothing_is_asked_of_anybody_and_nothing_is_logged(page, file):
    assert page.asked == [file.as_uri()]
    assert page.said == []


def test_axe_finds_nothing_serious(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra dev")
    found = axe.Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_it_is_the_same_without_scripts_and_fits_a_phone(browser, file):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(file.as_uri())
    assert "differentially private" in page.inner_text(".alert.good")
    context.close()
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_the_figures_in_the_document_are_the_ledgers(page, run):
    points = page.eval_on_selector_all(
        '#chart-epsilon-0 [data-series="certified (PLD)"] [data-value]',
        "nodes => nodes.map(node => [Number(node.dataset.x), Number(node.dataset.value)])",
    )
    record = read_run(run.folder)
    assert points == [[n, record.spent(record.accounts[0], n).epsilon] for n in range(5)]


def test_on_paper_every_table_is_whole(page, tmp_path):
    page.emulate_media(media="print")
    assert page.eval_on_selector_all(
        ".scroll", "nodes => nodes.every(n => getComputedStyle(n).overflowX === 'visible')"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
