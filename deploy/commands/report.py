"""``cloister report DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.errors import InvalidInput

REPORT = "report.html"


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of a run: runs/001, or a coordinator's runs/RUN")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"file to write; default: {REPORT} in the folder")
    ] = None,
) -> None:
    """Write a run's report again, from what its folder holds; says what is missing and what does not verify.

    Exit code 6 when the certificate or the ledger does not verify; the page is written all the same and says so on top.
    """
    from deploy.reporting.report import write_report
    from deploy.reporting.run_record import read_run

    record = read_run(folder)
    path = output or folder / REPORT
    if output is not None and not path.parent.is_dir():
        raise InvalidInput(f"{path.parent}: there is no such folder")
    write_report(record, path)
    typer.echo(f"{path}: the report of run {record.run_id}")
    for text in record.missing:
        typer.echo(f"missing: {text}")
    for text in record.broken:
        typer.echo(f"does not hold: {text}", err=True)
    if record.broken:
        raise typer.Exit(6)
