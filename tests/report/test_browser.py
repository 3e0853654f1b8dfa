"""The report in a real browser: nothing is asked of anybody, nothing is logged, nothing stands in a reader's way."""

import pytest
from browsing import serious_violations, watched

from deploy.reporting.report import write_report
from deploy.reporting.run_record import read_run

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(read_run(run.folder), path)
    return path


@pytest.fixture(params=["light", "dark"])
def page(chromium, file, request):
    with watched(chromium, file.as_uri(), color_scheme=request.param, viewport={"width": 1100, "height": 800}) as page:
        yield page


def test_nothing_is_asked_of_anybody_and_nothing_is_logged(page, file):
    assert page.asked == [file.as_uri()]
    assert page.said == []


def test_axe_finds_nothing_serious(page):
    assert serious_violations(page) == []


def test_it_is_the_same_without_scripts_and_fits_a_phone(chromium, file):
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(file.as_uri())
    assert "differentially private" in page.inner_text(".alert.good")
    context.close()
    context = chromium.new_context(viewport={"width": 360, "height": 740})
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
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 without its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    assert page.eval_on_selector_all("table", "nodes => Math.max(...nodes.map(n => n.scrollWidth))") <= 688
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
