"""Exports verify like the ledger, byte by byte; the commands say it and exit with the right code."""

import json
import random

import pytest
from typer.testing import CliRunner

from common.errors import InvalidInput, LedgerCorrupt
from common.ledger import Draft, Ledger, verify_rows
from common.ledger_export import export_lines, read_export, verify_export
from deploy.commands.ledger import certificate_app, export_ledger, ledger_app, read_anchor, verify_ledger

TEXT = 'a "quoted", [b]ε[/b]\u2028\x1c'
FORMS = ["json", "csv"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, clock=lambda: 1.9e9) as ledger:
        ledger.append_many([
            Draft("reserve", f"run-{i % 2}", {"n": i, "text": TEXT}, f"k{i}" if i % 3 else None)
            for i in range(20)
        ])  # fmt: skip
    return path


def run(app, *arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("form", FORMS)
def test_an_export_holds_every_line_and_verifies(path, tmp_path, form):
    output = tmp_path / f"export.{form}"
    assert export_ledger(str(path), output, form) == 20
    with Ledger(path, read_only=True) as ledger:
        assert [tuple(row) for row in read_export(output.read_bytes())] == [tuple(row) for row in ledger.rows()]
        head = ledger.head()
    assert verify_export(output, anchor=head) == 20
    assert verify_ledger(str(output))["entries"] == 20
    with pytest.raises(LedgerCorrupt, match="anchored"):
        verify_export(output, anchor="f" * 64)
    with pytest.raises(InvalidInput, match="cannot be written"):
        export_ledger(str(path), output, form)


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_position_of_an_export_counts(path, form):
    with Ledger(path, read_only=True) as ledger:
        data = b"".join(export_lines(ledger.rows(), form))
    assert verify_rows(read_export(data)) == 20
    chooser = random.Random(9)
    for position in chooser.sample(range(len(data)), 1500):
        other = chooser.choice([byte for byte in range(256) if byte != data[position]])
        with pytest.raises(LedgerCorrupt):
            verify_rows(read_export(data[:position] + bytes([other]) + data[position + 1 :]))
    with pytest.raises(LedgerCorrupt):
        read_export(data + b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_single_byte_position_of_an_export_counts(path, form):
    with Ledger(path, read_only=True) as ledger:
        data = b"".join(export_lines(ledger.rows(), form))
    for position, byte in enumerate(data):
        with pytest.raises(LedgerCorrupt):
            verify_rows(read_export(data[:position] + bytes([byte ^ 1]) + data[position + 1 :]))


def test_an_export_that_was_cut_needs_the_anchor(path):
    with Ledger(path, read_only=True) as ledger:
        lines, head = list(export_lines(ledger.rows(), "json")), ledger.head()
    assert verify_rows(read_export(b"".join(lines[:12]))) == 12
    with pytest.raises(LedgerCorrupt, match="anchored"):
        verify_rows(read_export(b"".join(lines[:12])), anchor=head)


def test_the_commands_say_what_they_found(path, tmp_path):
    result = run(ledger_app, "verify", path)
    assert result.exit_code == 0
    assert "20 lines" in result.output
    assert "--anchor" in result.output
    found = json.loads(run(ledger_app, "verify", path, "--json").output)
    assert f"head {found['head']}" in result.output
    anchor = tmp_path / "head"
    anchor.write_text(found["head"] + "\n")
    assert json.loads(run(ledger_app, "verify", path, "--anchor", anchor, "--json").output)["anchored"] is True
    shown = [json.loads(line) for line in run(ledger_app, "show", path, "--last", 3, "--json").output.split("\n")[:-1]]
    assert [line["seq"] for line in shown] == [18, 19, 20]
    assert "run-1" in run(ledger_app, "show", path, "--scope", "run-1", "--kind", "reserve").output
    exported = run(ledger_app, "export", path, "-o", tmp_path / "out.csv", "--format", "csv", "--json")
    assert json.loads(exported.output)["entries"] == 20


def test_faults_reach_the_caller_as_our_errors(path, tmp_path):
    from common.errors import Unavailable

    assert isinstance(run(ledger_app, "verify", tmp_path / "none.sqlite").exception, Unavailable)
    assert isinstance(run(ledger_app, "verify", path, "--anchor", "f" * 64).exception, LedgerCorrupt)
    assert isinstance(run(ledger_app, "verify", path, "--anchor", "nowhere").exception, InvalidInput)
    (tmp_path / "bad").write_text("no head")
    with pytest.raises(InvalidInput, match="no head"):
        read_anchor(str(tmp_path / "bad"))
    (tmp_path / "c.json").write_text("{}")
    assert isinstance(run(certificate_app, "verify", tmp_path / "c.json").exception, LedgerCorrupt)


def test_the_commands_load_on_a_coordinator_without_the_clients_libraries():
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'safetensors', 'datasets', 'psycopg', 'grpc_tools'):\n"
        "    sys.modules[name] = None\n"
        "import deploy.commands.ledger, deploy.commands.policy, deploy.commands.accountant, server.remote_accountant\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
