"""The report says what ledger, certificate and metrics say; what is missing or broken stands on top."""

import html
import json
import os
import re
import shutil
import sqlite3
import time

import pytest
from typer.testing import CliRunner

from common.certificate import estimate_of, verify_certificate
from common.charge import charge
from common.errors import InvalidInput
from common.pages import rounded_up
from common.statement import factor, most_correct_guesses, who_is_protected
from deploy.cli import app
from deploy.reporting.report import page
from deploy.reporting.run_record import read_run


def seen(text):
    """What a reader sees, in one line."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


@pytest.fixture(scope="module")
def shown(run):
    return page(read_run(run.folder))


def marks(text, figure, series):
    """The figures of one series of a chart, as the document carries them."""
    chart = text[text.index(f'id="chart-{figure}"') :].partition("</figure>")[0]
    # The line comes first, its dots in a second group of the same name.
    group = chart[chart.rindex(f'data-series="{html.escape(series)}"') + 1 :].partition('data-series="')[0]
    return {int(x): float(value) for x, value in re.findall(r'data-x="(\d+)" data-value="([^"]+)"', group)}


def test_charts_carry_the_ledgers_figures(run, shown):
    record = read_run(run.folder)
    account = record.accounts[0]
    events = account.envelope
    certified = marks(shown, "epsilon-0", "certified (PLD)")
    assert list(certified) == [0, 1, 2, 3, 4]
    for number, value in certified.items():
        again = charge(events[:number], relation=account.relation, delta=account.delta)
        assert value == again.epsilon
        assert marks(shown, "epsilon-0", "by RDP, an upper bound too")[number] == again.epsilon_rdp
    estimate = estimate_of(events, relation=account.relation, delta=account.delta).epsilon
    assert marks(shown, "epsilon-0", "Edgeworth estimate, no guarantee")[4] == estimate
    assert marks(shown, "score", "score") == {line["round"]: line["score"] for line in run.metrics}


def test_the_last_point_of_every_chart_is_what_the_accountant_said(run):
    record = read_run(run.folder)
    for account in record.accounts:
        assert record.spent(account, 4).epsilon == run.metrics[-1]["epsilon"][account.name]


def test_every_outcome_is_that_of_the_ledger_and_every_trouble_is_told(run, shown):
    record = read_run(run.folder)
    assert {(one.server_round, one.client): one.outcome for one in record.asked} == run.outcomes
    text = seen(shown)
    assert "2 clinic-b timeout charged" in text
    assert "2 clinic-c refused (backbone); it never started not charged" in text
    assert "3 clinic-c lost charged" in text
    rows = re.findall(r"<tr><th scope=\"row\">(\d+)</th>(.*?)</tr>", shown[shown.index('id="rounds"') :], re.S)
    cells = {int(number): re.findall(r"<td>([^<]*)</td>", row)[3:8] for number, row in rows[:5]}
    assert cells[1] == ["3", "3", "0", "0", "3"]
    assert cells[2] == ["3", "1", "1", "1", "2"]
    assert cells[3] == ["3", "2", "0", "1", "3"]


def test_the_statement_is_the_certificates(run, shown):
    certificate = verify_certificate(run.folder / "certificate.json").certificate
    text = seen(shown)
    assert re.sub(r"\s+", " ", who_is_protected(certificate)) in text
    for item in (*certificate.not_protected, *certificate.notes):
        assert item in text
    assert "relation" in text
    assert "What ε and δ mean" in text
    for digits in (certificate.backbone_hash, certificate.adapter_hash, certificate.accountant_head):
        assert digits in text


def test_figures_are_rounded_against_us(run, shown):
    record = read_run(run.folder)
    for account in record.accounts:
        guarantee = charge(account.envelope, relation=account.relation, delta=account.delta).epsilon
        assert rounded_up(guarantee) in shown
        assert float(rounded_up(guarantee)) >= guarantee


def test_it_is_one_file_that_asks_nobody_for_anything(shown):
    assert "<script" not in shown
    assert "<link" not in shown
    assert not re.search(r"(?:src|href|action)=\"(?!#|data:)", shown)
    assert set(re.findall(r"https?://[^\"' ]*", shown)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in shown
    assert "@import" not in shown


def test_a_run_that_is_not_private_says_so_on_top(make):
    made = make(reasons=("the run was made without noise",))
    text = page(read_run(made.folder))
    assert text.index("Not private.") < text.index("<h1>")
    assert "no guarantee: the run was made without noise" in seen(text)
    assert "Private." not in text.replace("Not private.", "")


def test_names_and_notes_are_text(make):
    names = ("<script>alert(1)</script>", "b&b", 'c"d')
    text = page(read_run(make(names=names, trouble={}).folder))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("deployed", [True, False])
def test_a_run_that_is_not_finished_has_a_report_that_says_so(make, deployed):
    made = make(finished=False, deployed=deployed, trouble={})
    record = read_run(made.folder)
    assert record.run_id == made.run_id
    text = page(record)
    assert text.index("Missing.") < text.index("<h1>")
    assert "nobody has signed these figures" in text
    assert "Every request that was sent came back as an update" in text
    assert "differentially private" not in text


def test_a_coordinators_run_is_read_from_the_ledger_of_all_its_runs(make):
    made = make(deployed=True)
    record = read_run(made.folder)
    assert record.has_ledger
    assert not record.broken
    assert not record.missing
    assert {(one.server_round, one.client): one.outcome for one in record.asked} == made.outcomes


def test_without_the_ledger_the_certificate_is_listed_and_the_gap_is_said(make):
    made = make()
    for file in made.folder.glob("ledger.sqlite*"):
        file.unlink()
    record = read_run(made.folder)
    assert not record.has_ledger
    text = seen(page(record))
    assert "Missing. ledger.sqlite" in text
    assert len(record.asked) == 3 * 4 - 1
    assert "refused (backbone)" not in text


def spoil_ledger(folder):
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        connection.execute("DROP TRIGGER ledger_entries_no_update")
        connection.execute("UPDATE ledger_entries SET time_us = time_us + 1 WHERE seq = 3")
    connection.close()


def cut_ledger(folder):
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        connection.execute("DROP TRIGGER ledger_entries_no_delete")
        connection.execute("DELETE FROM ledger_entries WHERE seq > (SELECT max(seq) - 2 FROM ledger_entries)")
    connection.close()


def no_database(folder):
    (folder / "ledger.sqlite").write_bytes(b"nothing of the kind" * 100)


def spoil_certificate(folder):
    file = folder / "certificate.json"
    file.write_text(file.read_text().replace('"rounds_run":4', '"rounds_run":3'))


def another_certificate(folder):
    (folder / "state" / "run.json").write_text(json.dumps({"run_id": "cd" * 8}))


def spoil_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"round": 1}\n')


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (spoil_ledger, "ledger.sqlite does not verify: ledger line 3 was changed"),
        (cut_ledger, "ledger.sqlite does not hold the head that the certificate names"),
        (no_database, "ledger.sqlite does not verify"),
        (spoil_certificate, "certificate.json does not verify"),
        (another_certificate, "certificate.json speaks of run abababababababab"),
        (spoil_metrics, "metrics.jsonl cannot be read"),
    ],
)
def test_what_does_not_hold_is_red_on_top_and_is_exit_code_6(make, harm, words):
    made = make()
    harm(made.folder)
    done = CliRunner().invoke(app, ["report", str(made.folder)])
    assert done.exit_code == 6, done.output
    assert words in done.stderr
    text = (made.folder / "report.html").read_text("utf-8")
    assert '<div class="alert bad" role="alert">' in text
    assert text.index("Does not verify.") < text.index("<h1>")
    assert words in html.unescape(text)


def test_the_command_writes_the_same_page_again_and_says_what_is_missing(run, tmp_path, shown):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert (folder / "report.html").read_text("utf-8") == shown
    (folder / "certificate.json").unlink()
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "other.html")])
    assert done.exit_code == 0
    assert "missing: certificate.json" in done.stdout
    assert (tmp_path / "other.html").exists()


def test_an_unknown_folder_and_one_without_a_run_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="there is no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="holds no run"):
        read_run(tmp_path)


def test_many_clients_and_rounds_stay_below_a_megabyte(make):
    made = make(names=tuple(f"clinic-{n:03d}" for n in range(120)), rounds=5, trouble={})
    text = page(read_run(made.folder))
    assert len(text.encode()) < 1_000_000
    assert "20 more organisations" in text
    assert "114 others spend no more" in text


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.0), (1.0, 1e-5), (3.0, 1e-3), (8.0, 1e-5)])
def test_the_share_of_right_guesses_is_that_of_the_best_test(epsilon, delta):
    """Second witness: the best threshold on the region of tests that (ε, δ) allows, by search."""
    import numpy as np

    false_alarm = np.linspace(0, 1, 2_000_001)
    e = np.exp(epsilon)
    detected = np.minimum.reduce(
        [np.ones_like(false_alarm), e * false_alarm + delta, 1 - (1 - delta - false_alarm) / e]
    )
    best = float(np.max(0.5 * (detected + 1 - false_alarm)))
    stated = float(most_correct_guesses(epsilon, delta).removesuffix(" %")) / 100
    assert best <= stated + 1e-12
    assert stated - best <= 1.1e-4


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 6.9, 8.0, 13.9, 60.0])
def test_the_factor_is_never_below_e_to_the_epsilon(epsilon):
    import math

    stated = float(factor(epsilon).replace(",", ""))
    assert math.exp(epsilon) <= stated <= math.exp(epsilon) * 1.02


def test_a_coordinators_secretary_writes_each_report_once_and_again_for_a_new_certificate(make):
    from deploy.running.secretary import Secretary

    made = make(deployed=True, trouble={})
    secretary = Secretary(made.folder.parent.parent)
    assert secretary.write_due() == [made.folder / "report.html"]
    assert secretary.write_due() == []
    certificate = made.folder / "certificate.json"
    data = certificate.read_bytes()
    os.utime(certificate, ns=(time.time_ns() + 10**9, time.time_ns() + 10**9))
    assert secretary.write_due() == [made.folder / "report.html"]
    assert certificate.read_bytes() == data
    certificate.unlink()
    assert secretary.write_due() == []


def test_who_signed_nothing_is_named_and_the_largest_epsilon_is_of_those_who_signed(make, shown):
    text = seen(page(read_run(make(absent=("clinic-b",)).folder)))
    assert "largest ε of any organisation that signed" in text
    assert "Not attested. clinic-b signed nothing: it was not connected when the run ended" in text
    assert re.search(r"clinic-b \(clinic-b-notes\) not attested", text)
    assert "that signed" not in seen(shown)


def test_who_contradicts_is_named_with_the_contradiction(make):
    text = seen(page(read_run(make(contradicting=("clinic-b",)).folder)))
    assert "Contradicted. clinic-b signed what does not agree with the coordinator's book" in text
    assert "its part is of data set another, the coordinator's book of clinic-b-notes" in text
    assert "largest ε of any organisation whose signed part stands" in text
    assert "Not attested. clinic-b" not in text
