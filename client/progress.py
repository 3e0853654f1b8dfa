"""How far the running round is and what is left of the budget: for the organisation's own eyes.

A Unix socket that only the trainer's user may open answers every connection with one JSON object. None of it may leave
the organisation: progress and duration can depend on records.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from client.guard import Guard
from common.attestation import PartRequest
from common.certificate import SignedPart
from common.errors import InvalidInput, Unavailable
from common.history import ListRequest, SignedHistory
from common.messages import Description, Refusal, Reply, Status, TrainRequest

log = logging.getLogger(__name__)

LARGEST_ANSWER = 1 << 20

REMEMBERED = 50
"""Refusals that are told one by one; all of them are counted. Anybody who reaches the relay can cause one."""

LONGEST_NAME = 64
"""Characters of a run's name that are kept of a request nobody has signed."""


class Progress:
    """What the trainer is doing; written by its thread, read by the socket's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._current: dict[str, Any] | None = None
        self._finished = 0
        self._answers: Counter[str] = Counter()
        self._refusals: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)

    def __call__(self, client: str, step: int, steps: int) -> None:
        """A step of the running round is done (``client.trainer.StepListener``)."""
        with self._lock:
            if self._current is not None:
                self._current |= {"step": step, "steps": steps}

    def begin(self, request: TrainRequest) -> bool:
        """A request has come; False while another one is worked on (the guard will say that it is busy)."""
        plan = request.plan
        with self._lock:
            if self._current is not None:
                return False
            self._current = {
                "run_id": plan.run_id, "round": plan.server_round, "step": 0, "steps": plan.local_steps,
                "since": self._clock(),
            }  # fmt: skip
            return True

    def end(self) -> None:
        """The request was answered."""
        with self._lock:
            self._current, self._finished = None, self._finished + 1

    def tell(self, request: TrainRequest, outcome: str, reason: str = "") -> None:
        """Count one answer: ``reply``, ``refused`` or the word of a status; refusals are kept with their reason."""
        with self._lock:
            self._answers[outcome] += 1
            if outcome == "refused":
                run_id = str(request.plan.run_id)[:LONGEST_NAME]
                server_round = request.plan.server_round
                self._refusals.append(
                    {
                        "time": self._clock(), "run_id": run_id, "reason": reason,
                        "round": server_round if type(server_round) is int else None,
                    }
                )  # fmt: skip

    @property
    def is_training(self) -> bool:
        """Whether a request is being worked on."""
        with self._lock:
            return self._current is not None

    def read(self) -> dict[str, Any]:
        """A JSON object."""
        with self._lock:
            state = "idle" if self._current is None else "working"
            return {
                "state": state, "request": self._current and dict(self._current), "answered": self._finished,
                "answers": dict(self._answers), "refusals": list(self._refusals),
            }  # fmt: skip


class WatchedTrainer:
    """A trainer whose progress can be read; it says and does the same."""

    def __init__(self, trainer: Any, progress: Progress) -> None:
        self._trainer, self._progress = trainer, progress

    def describe(self) -> Description:
        """Public facts."""
        return self._trainer.describe()

    def signed_list(self, request: ListRequest) -> SignedHistory | Status:
        """See the trainer."""
        return self._trainer.signed_list(request)

    def signed_part(self, request: PartRequest) -> SignedPart | Status:
        """See the trainer."""
        return self._trainer.signed_part(request)

    def train(self, request: TrainRequest) -> Reply | Refusal | Status:
        """One round."""
        is_ours = self._progress.begin(request)
        where = {"run": str(request.plan.run_id)[:LONGEST_NAME], "round": request.plan.server_round}
        log.info("a request has come", extra=where)
        try:
            answer = self._trainer.train(request)
            outcome, reason = _told(answer)
            self._progress.tell(request, outcome, reason)
            log.info("answered: %s", reason or outcome, extra=where | {"outcome": outcome, "reason": reason or None})
            return answer
        finally:
            if is_ours:
                self._progress.end()


def _told(answer: Reply | Refusal | Status) -> tuple[str, str]:
    """What left, in a word of a fixed list, and the reason of a refusal."""
    if isinstance(answer, Reply):
        return "reply", ""
    if isinstance(answer, Refusal):
        return "refused", str(answer.reason)
    return str(answer.code), ""


def status_of(guard: Guard, dataset: str, progress: Progress) -> dict[str, Any]:
    """Everything the local socket tells."""
    spent = guard.spent(dataset)
    return {
        "organisation": guard.policy.organisation,
        "dataset": dataset,
        **progress.read(),
        "budget": {**vars(spent), "left": spent.left},
    }


def serve_status(path: Path, answer: Callable[[], dict[str, Any]]) -> socketserver.BaseServer:
    """Answer on a Unix socket of mode 0600 until ``shutdown`` is called.

    Raises:
        Unavailable: the socket cannot be made.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                self.wfile.write(json.dumps(answer()).encode())
            except OSError:  # whoever asked has gone
                pass
            except Exception:
                log.exception("the status cannot be told")

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with suppress(FileNotFoundError):
        path.unlink()  # of a trainer that was killed: the guard's lock says that it is gone
    before = os.umask(0o177)
    try:
        server = Server(str(path), Handler)
    except OSError as error:
        raise Unavailable(f"{path}: no socket can be made there ({error.strerror or error})") from error
    finally:
        os.umask(before)
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    return server


def ask_status(path: Path, timeout_s: float = 10.0) -> dict[str, Any]:
    """What a running trainer tells its own organisation.

    Raises:
        Unavailable: no trainer answers there. InvalidInput: what answers is no trainer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            body = b""
            while len(body) < LARGEST_ANSWER and (block := connection.recv(65536)):
                body += block
        except OSError as error:
            raise Unavailable(
                f"{path}: no trainer answers there ({error.strerror or error}); start it with 'cloister client trainer'"
            ) from error
    try:
        found = json.loads(body)
    except ValueError as error:
        raise InvalidInput(f"{path}: what answers there is no trainer") from error
    return dict(found)
