"""Writes the report of every run that gets its certificate, while ``cloister coordinator serve`` runs.

The run's own process cannot: Flower ships it as code alone, without the pages' templates.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import CloisterError
from deploy.running.runs import every_run

log = logging.getLogger(__name__)

LOOK_S = 2.0


class Secretary:
    """Looks at the runs of a coordinator's folder and writes the reports that are due."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._tried: dict[Path, int] = {}

    def write_due(self) -> list[Path]:
        """Write a report beside every certificate that is newer than its report; a failure is not tried again."""
        written = []
        for run in every_run(self._home):
            certificate, report = run.path / "certificate.json", run.path / "report.html"
            if not certificate.exists():
                continue
            stamp = certificate.stat().st_mtime_ns
            is_due = not report.exists() or report.stat().st_mtime_ns < stamp
            if not is_due or self._tried.get(certificate) == stamp:
                continue
            self._tried[certificate] = stamp
            try:
                _write(run.path, report)
            except CloisterError as error:
                log.warning("no report: %s", error, extra={"run": run.run_id})
                continue
            log.info("the report is written", extra={"run": run.run_id})
            written.append(report)
        return written


@contextmanager
def writing_reports(home: Path) -> Iterator[None]:
    """A secretary at work until the block ends."""
    secretary, stopped = Secretary(home), threading.Event()

    def work() -> None:
        while not stopped.wait(LOOK_S):
            try:
                secretary.write_due()
            except OSError as error:  # a run's folder that was just removed, a full disk: the next look may do
                log.warning("the runs cannot be looked at (%s)", error.strerror)

    thread = threading.Thread(target=work, name="secretary", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()


def _write(folder: Path, report: Path) -> None:
    from deploy.reporting.report import write_report
    from deploy.reporting.run_record import read_run

    write_report(read_run(folder), report)
