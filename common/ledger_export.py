"""A ledger as a file for people and auditors: JSON Lines or CSV, every byte of which counts.

An export holds the stored lines exactly, salts and hashes included, so that it verifies like the ledger itself. It is
read back only if writing what was read gives the same bytes: a changed blank is found like a changed number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import InvalidInput, LedgerCorrupt
from common.ledger import Row, verify_rows
from common.signing import canonical

Format = Literal["json", "csv"]
_LONGEST_FIELD = 2**31 - 1


def export_lines(rows: Iterable[Sequence[Any]], form: Format) -> Iterator[bytes]:
    """The file, line by line; the CSV has a head line and writes no key as an empty field."""
    if form == "csv":
        yield _csv_line(Row._fields)
    for values in rows:
        row = Row(*values)
        yield _csv_line(row) if form == "csv" else canonical(row._asdict()) + b"\n"


def read_export(data: bytes) -> list[Row]:
    """The lines of an export, whichever form it has.

    Raises:
        LedgerCorrupt: the bytes are not those of an export.
    """
    form: Format = "csv" if data.startswith(_csv_line(Row._fields)) else "json"
    try:
        text = data.decode("utf-8")
        rows = _read_csv(text) if form == "csv" else _read_json(text)
        exact = b"".join(export_lines(rows, form)) == data
    except (IndexError, TypeError, ValueError, RecursionError, csv.Error) as error:
        raise LedgerCorrupt(f"this is no exported ledger: {error}") from error
    if not exact:
        raise LedgerCorrupt("the exported ledger was changed or reformatted")
    return rows


def verify_export(path: Path, *, anchor: str | None = None) -> int:
    """Check an exported file; returns the number of lines.

    Raises:
        InvalidInput: the file cannot be read.
        LedgerCorrupt: it does not verify, or does not hold the anchored head.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: the export cannot be read ({error.strerror})") from error
    return verify_rows(read_export(data), anchor=anchor)


def _csv_line(values: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(
        "" if value is None else value for value in values
    )
    return line.getvalue().encode()


def _read_csv(text: str) -> list[Row]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:]
    finally:
        csv.field_size_limit(before)
    return [
        Row(int(seq), int(time_us), kind, scope, key or None, *rest) for seq, time_us, kind, scope, key, *rest in lines
    ]


def _read_json(text: str) -> list[Row]:
    *lines, rest = text.split("\n")  # and at no other character that Unicode calls a line's end
    if rest:
        raise ValueError("the last line does not end")
    return [Row(**json.loads(line)) for line in lines]
