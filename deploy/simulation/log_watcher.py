"""What a simulation tells its JSON log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.data.tokens import Prepared
from deploy.inputs import Inputs
from deploy.simulation.simulate import Result, Watcher
from server.accountant import Denial, Outcome
from server.terms import RunTerms

log = logging.getLogger(__name__)


class LogWatcher(Watcher):
    """A simulation's events, one line each. Counts of records are an organisation's own and are not among them."""

    def __init__(self) -> None:
        self._run = self._rounds = None

    def prepared(self, terms: RunTerms, prepared: Mapping[str, Prepared], inputs: Inputs, output: Path) -> None:
        """See ``Watcher``; the same holds for every method below."""
        self._run, self._rounds = terms.run_id, terms.rounds
        self._say("the run begins", rounds=terms.rounds, clients=[client.name for client in terms.clients])

    def warn(self, text: str) -> None:  # noqa: D102
        self._say(text, level=logging.WARNING)

    def round_started(self, server_round: int, clients: tuple[str, ...]) -> None:  # noqa: D102
        self._say("round begins", round=server_round, clients=list(clients))

    def answered(self, server_round: int, client: str, outcome: Outcome, reason: str) -> None:  # noqa: D102
        level = logging.INFO if outcome is Outcome.REPLIED else logging.WARNING
        fields = {"round": server_round, "client": client, "outcome": str(outcome)}
        self._say("answered", level=level, reason=reason or None, **fields)

    def denied(self, server_round: int, denial: Denial) -> None:  # noqa: D102
        reason = f"no {denial.reason} is left"
        self._say("left out", level=logging.WARNING, round=server_round, client=denial.client, reason=reason)

    def absent(self, server_round: int, client: str) -> None:  # noqa: D102
        self._say("not connected", level=logging.WARNING, round=server_round, client=client)

    def disagreed(self, client: str, reason: str) -> None:  # noqa: D102
        self._say("its signed list was not taken over", level=logging.WARNING, client=client, reason=reason)

    def round_ended(self, record: Mapping[str, Any]) -> None:  # noqa: D102
        self._say("round ended", **{name: record[name] for name in ("round", "score", "loss", "epsilon", "seconds")})

    def finished(self, result: Result) -> None:
        """The run is over and everything is written."""
        private = "private" if result.certificate.private else "not private"
        reasons = "; ".join(result.certificate.reasons) or None
        self._say("the run is finished", outcome=private, reason=reasons, rounds=result.metrics[-1]["round"])

    def _say(self, text: str, *, level: int = logging.INFO, **fields: Any) -> None:
        known = {name: value for name, value in fields.items() if value is not None}
        log.log(level, text, extra={"run": self._run, **known} if self._run else known)
