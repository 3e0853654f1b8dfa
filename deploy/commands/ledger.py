"""``cloister ledger verify|show|export`` and ``cloister certificate verify``.

The functions do the work and can be imported; the commands print what they return. Faults are raised as the errors of
``common/errors.py``: exit code 6 when something does not verify, 5 when other keys signed it, 2 when it cannot be read.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.certificate import Verdict, verify_certificate
from common.errors import InvalidInput
from common.ledger import Entry, Ledger
from common.ledger_export import Format, export_lines, verify_export
from common.text import shown

ledger_app = typer.Typer(name="ledger", help="Look at a ledger, check it, take it elsewhere.", no_args_is_help=True)
certificate_app = typer.Typer(name="certificate", help="Check what a run states about itself.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="LEDGER", help="SQLite file or database URL")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Anchor = Annotated[
    str | None,
    typer.Option("--anchor", help="a head the ledger must hold, or a file with it (also a certificate)"),
]


def verify_ledger(source: str, *, anchor: str | None = None) -> dict[str, Any]:
    """Check every line of a ledger or of an export (``.jsonl``, ``.json``, ``.csv``).

    Returns:
        ``entries``, ``head`` (None for an empty one) and ``anchored``: whether a head from outside was looked for.
    """
    head = None if anchor is None else read_anchor(anchor)
    if "://" not in source and Path(source).suffix in (".jsonl", ".json", ".csv"):
        return {"entries": verify_export(Path(source), anchor=head), "anchored": head is not None}
    with Ledger(source, read_only=True) as ledger:
        return {"entries": ledger.verify(anchor=head), "head": ledger.head(), "anchored": head is not None}


def read_anchor(text: str) -> str:
    """A head given as 64 hexadecimal digits, or the one that a file holds: an anchor, or a certificate that verifies.

    Raises:
        InvalidInput: it is none of them. LedgerCorrupt: the certificate does not verify.
    """
    candidate = text
    if len(text) != 64:
        try:
            data = Path(text).read_bytes()
        except OSError as error:
            raise InvalidInput(f"{text}: neither a head nor a readable file with one") from error
        if data.startswith(b"{"):
            return verify_certificate(data).certificate.accountant_head
        candidate = data.decode("ascii", errors="replace").strip()
    if len(candidate) != 64 or set(candidate) - set("0123456789abcdef"):
        raise InvalidInput(f"{text}: holds no head (64 hexadecimal digits)")
    return candidate


def show_ledger(
    source: str, *, scope: str | None = None, kind: str | None = None, last: int | None = None
) -> Iterator[Entry]:
    """The lines in order, those of one scope or kind, or the last ones only."""
    with Ledger(source, read_only=True) as ledger:
        entries = ledger.entries(scope=scope, kind=kind)
        if last is None:
            yield from entries
            return
        kept: list[Entry] = []
        for entry in entries:
            kept.append(entry)
            del kept[:-last]
        yield from kept


def export_ledger(source: str, path: Path, form: Format) -> int:
    """Write the whole ledger to a new file, durably; returns the number of lines.

    Raises:
        InvalidInput: the file exists or cannot be written.
        LedgerCorrupt: the ledger does not verify; nothing is written.
    """
    with Ledger(source, read_only=True) as ledger:
        count = ledger.verify()
        try:
            with path.open("xb") as file:
                for line in islice(export_lines(ledger.rows(), form), count + (form == "csv")):
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidInput(f"{path}: the export cannot be written ({error.strerror})") from error
    return count


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """What ``certificate verify --json`` prints."""
    return {
        "consistent": True,
        "private": verdict.private,
        "reasons": list(verdict.certificate.reasons),
        "run_id": verdict.certificate.run_id,
        "epsilons": {name: asdict(numbers) for name, numbers in verdict.epsilons.items()},
        "absent": {one.part.client: one.reason for one in verdict.certificate.absent},
        "contradictions": {name: list(found) for name, found in verdict.contradictions.items()},
        "pinned": list(verdict.pinned),
        "unpinned": list(verdict.unpinned),
        "not_protected": list(verdict.certificate.not_protected),
    }


@ledger_app.command("verify")
def _verify(source: Source, anchor: Anchor = None, as_json: Json = False) -> None:
    """Check every line of a ledger, or of an export, and that it holds an anchored head."""
    found = verify_ledger(source, anchor=anchor)
    if as_json:
        _print_json(found)
        return
    _say(f"{source}: {found['entries']} lines, every one as it was written.")
    if "head" in found:
        _say(f"head {found['head']}")
    if not found["anchored"]:
        _say("Lines cut off at the end cannot be seen without --anchor, a head that was kept elsewhere.")


@ledger_app.command("show")
def _show(
    source: Source,
    scope: Annotated[str | None, typer.Option("--scope", help="a run, or a coordinator's key")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="reserve, commit, started, …")] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="only the last N lines")] = 20,
    as_json: Json = False,
) -> None:
    """Print the lines of a ledger."""
    entries = show_ledger(source, scope=scope, kind=kind, last=last)
    if as_json:
        for entry in entries:
            _print_json(entry_json(entry))
        return
    table = Table("line", "time (UTC)", "kind", "scope", "body", "hash")
    for entry in entries:
        when = datetime.datetime.fromtimestamp(entry.time, datetime.UTC).isoformat(sep=" ", timespec="seconds")[:-6]
        table.add_row(str(entry.seq), when, *(escape(one) for one in _cells(entry)), entry.hash[:12])
    Console().print(table)


def _cells(entry: Entry) -> tuple[str, str, str]:
    """Kind, scope and body as a table shows them: a ledger holds what others wrote, whatever that was."""
    return shown(entry.kind[:24]), shown(entry.scope[:24]), shown(entry.text[:160])


def entry_json(entry: Entry) -> Mapping[str, Any]:
    """One line as ``ledger show --json`` prints it."""
    return {
        "seq": entry.seq,
        "time": entry.time,
        "kind": entry.kind,
        "scope": entry.scope,
        "body": entry.body,
        "hash": entry.hash,
    }


@ledger_app.command("export")
def _export(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write; it must not exist")],
    form: Annotated[Literal["json", "csv"], typer.Option("--format", help="JSON Lines or CSV")] = "json",
    as_json: Json = False,
) -> None:
    """Write the whole ledger to a file that ``ledger verify`` can check."""
    count = export_ledger(source, output, form)
    if as_json:
        _print_json({"entries": count, "output": str(output)})
    else:
        _say(f"{output}: {count} lines")


@ledger_app.command("migrate")
def _migrate(source: Source) -> None:
    """Bring a ledger's schema to the newest revision (needs the extra ``postgres``)."""
    try:
        from deploy.migrations import upgrade
    except ImportError as error:
        raise InvalidInput("Alembic is not installed; pip install 'cloister[postgres]'") from error
    upgrade(source)
    _say(f"{source}: the schema is the newest one")


@ledger_app.command("reader")
def _reader(
    source: Source,
    role: Annotated[str, typer.Option("--role", help="name of the role")],
    password_file: Annotated[Path, typer.Option("--password-file", help="holds the role's password, nothing else")],
) -> None:
    """Make a PostgreSQL role that can read the ledger and nothing else, or set it right again (for the dashboard)."""
    from deploy.provisioning.database import make_reader, read_password

    is_closed = make_reader(source, role, read_password(password_file))
    _say(f"{role}: may read the ledger and nothing else")
    if not is_closed:
        text = "warning: no superuser made it, so it can take advisory locks, which the ledger's writer waits for"
        typer.echo(text, err=True)


@certificate_app.callback()
def _certificate() -> None:
    """Check what a run states about itself."""


@certificate_app.command("verify")
def _verify_certificate(
    path: Annotated[Path, typer.Argument(metavar="CERTIFICATE", help="certificate.json of a run")],
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="pin a key (coordinator's, accountant's, clients'); may be repeated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a certificate offline: signatures, exact bytes, and every ε computed again."""
    verdict = verify_certificate(path, public_key=public_key or None)
    if as_json:
        _print_json(verdict_json(verdict))
        return
    _say("The certificate is consistent: its signatures hold and every ε was computed again.\n")
    _say(verdict.statement)


def _print_json(body: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(body, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    """Plain text on standard output."""
    sys.stdout.write(text + "\n")
