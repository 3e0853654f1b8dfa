"""What the organisation's page shows at one moment: its ledger beside what the trainer says, with the age of both."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.dashboard.book import Book, Declined, LedgerReader
from client.journal import State, Use
from client.policy import DatasetPolicy, Policy
from client.progress import ask_status
from common.anchor import FileAnchor
from common.charge import charge
from common.errors import CloisterError

ASK_TIMEOUT_S = 2.0
REFRESH_S, ASLEEP_AFTER_S = 1.0, 30.0
MOST_LINES = 200
"""Releases and refusals that are listed; all are counted."""

STATES = {
    State.STARTED: "training, or cut off",
    State.REPLIED: "released",
    State.LOST: "lost: spent, and nothing was released",
}

REASONS: Mapping[str, tuple[str, str]] = {
    "policy": ("the plan asks for what the policy does not allow", "compare the run's settings with policy.toml"),
    "budget": ("the run's envelope does not fit into what is left of the budget", "a smaller run, or a larger budget"),
    "envelope": ("the round lies outside what the run announced, or its place was used", "nothing: it protects you"),
    "plan": ("plan and reservation disagree, or the plan is malformed", "ask the coordinator"),
    "signature": (
        "a signature is not of a pinned key",
        "compare keys with the coordinator; somebody else may be asking",
    ),
    "backbone": ("another backbone than the policy allows", "get the right one, or allow its hash"),
    "adapter": ("the adapter is not finite, or not of the agreed shape", "ask the coordinator"),
    "ledger": ("the ledger cannot be written or does not verify", "look at the trainer's log and the disk"),
    "busy": ("another request was being trained", "nothing: it is asked again"),
    "used": ("the reservation was used before for another request", "nothing: it protects you"),
    "recipe": ("the run trains by another recipe than this trainer", "compare trainer.toml with the run's settings"),
}
"""What each reason of a refusal means, and what to do about it."""


@dataclass(frozen=True)
class Run:
    """One run's charge on a data set."""

    time: float
    coordinator: str
    run_id: str
    epsilon: float
    delta: float
    released_epsilon: float | None
    planned: int
    released: int
    lost: int

    @property
    def is_private(self) -> bool:
        """Whether its rounds are noised."""
        return math.isfinite(self.epsilon)


@dataclass(frozen=True)
class Dataset:
    """One data set: its lifetime budget and the runs that were charged to it."""

    name: str
    policy: DatasetPolicy
    spent_epsilon: float
    spent_delta: float
    runs: tuple[Run, ...]

    @property
    def left(self) -> float:
        """ε that a further run may take at most."""
        return max(0.0, self.policy.target_epsilon - self.spent_epsilon)

    @property
    def share(self) -> float:
        """Of the lifetime ε that is charged, at most 1."""
        return min(1.0, self.spent_epsilon / self.policy.target_epsilon)


@dataclass(frozen=True)
class Release:
    """One training that began."""

    time: float
    run_id: str
    server_round: int
    dataset: str
    coordinator: str
    state: str
    use: Use = field(repr=False)


@dataclass(frozen=True)
class Trainer:
    """The trainer's last word and its age in seconds; ``status`` is None when it never answered."""

    status: Mapping[str, Any] | None
    age_s: float
    answers: bool


@dataclass(frozen=True)
class Snapshot:
    """Everything on the page; ``version`` changes with it, ``news`` says aloud what the ledger has more than before."""

    now: float
    policy: Policy
    datasets: tuple[Dataset, ...]
    releases: tuple[Release, ...]
    release_count: int
    declined: tuple[Declined, ...]
    declined_count: int
    trainer: Trainer
    lines: int
    last_time: float | None
    alarms: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    version: str = ""
    news: str = ""


class Lookout:
    """Looks at ledger, trainer and policy once a second, as long as somebody reads the page.

    Args:
        policy_path: the organisation's policy.
        ledger_path: its ledger; opened for reading only.
        status_path: the trainer's local socket.
        clock: seconds since the epoch.

    Raises:
        InvalidInput: the policy cannot be read.
    """

    def __init__(
        self, policy_path: Path, ledger_path: Path, status_path: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._policy_path, self._status_path, self._clock = policy_path, status_path, clock
        self._policy, self._policy_problem = Policy.load(policy_path), ""
        self._reader = LedgerReader(ledger_path)
        self._said: tuple[float, Mapping[str, Any]] | None = None
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._asked = 0.0
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def now(self) -> Snapshot:
        """The state at this moment; at most ``REFRESH_S`` old."""
        self._asked = time.monotonic()
        self._wanted.set()
        with self._lock:
            if self._snapshot is None or self._clock() - self._snapshot.now > REFRESH_S:
                self._snapshot = self._look()
            return self._snapshot

    def word(self) -> tuple[str, str]:
        """Version and news of the last look; cheap. The first call starts the looking."""
        self._asked = time.monotonic()
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_looking, name="lookout", daemon=True)
            self._thread.start()
        last = self._snapshot
        return ("", "") if last is None else (last.version, last.news)

    def _keep_looking(self) -> None:
        while True:
            self._wanted.wait()
            with self._lock:
                self._snapshot = self._look()
            if time.monotonic() - self._asked > ASLEEP_AFTER_S:
                self._wanted.clear()
            time.sleep(REFRESH_S)

    def _look(self) -> Snapshot:
        now = self._clock()
        self._reload_policy()
        self._reader.look()
        trainer = self._ask(now)
        book, policy = self._reader.book, self._policy
        releases = [_release(moment, use) for moment, use in book.released()]
        found = Snapshot(
            now=now,
            policy=policy,
            datasets=tuple(_dataset(name, allowed, book) for name, allowed in sorted(policy.datasets.items())),
            releases=tuple(releases[:MOST_LINES]),
            release_count=len(releases),
            declined=tuple(reversed(book.declined[-MOST_LINES:])),
            declined_count=len(book.declined),
            trainer=trainer,
            lines=book.seq,
            last_time=book.last_time,
            alarms=tuple(self._alarms(book, policy)),
            warnings=tuple(self._warnings(policy, now)),
            news=self._news(book),
        )
        return _versioned(found)

    def _news(self, book: Book) -> str:
        """What is worth being read aloud: not every step of a round."""
        if self._snapshot is None or self._snapshot.lines == book.seq:
            return ""
        return "The ledger has new lines; the page was brought up to date."

    def _reload_policy(self) -> None:
        try:
            self._policy, self._policy_problem = Policy.load(self._policy_path), ""
        except CloisterError as error:
            self._policy_problem = f"{error}; shown is the policy as it was before"

    def _ask(self, now: float) -> Trainer:
        try:
            self._said = (now, ask_status(self._status_path, ASK_TIMEOUT_S))
        except CloisterError:
            if self._said is None:
                return Trainer(None, 0.0, False)
            return Trainer(self._said[1], max(0.0, now - self._said[0]), False)
        return Trainer(self._said[1], 0.0, True)

    def _alarms(self, book: Book, policy: Policy) -> list[str]:
        """What must be seen before anything else: the ledger cannot be believed."""
        found = []
        if self._reader.problem is not None:
            word = "The ledger does not verify" if self._reader.is_corrupt else "The ledger cannot be read"
            found.append(f"{word}: {self._reader.problem}")
        if policy.anchor is not None and self._reader.problem is None and not self._reader.is_missing:
            try:
                head = FileAnchor(policy.anchor).read()
            except CloisterError as error:
                found.append(f"The ledger's anchor cannot be asked: {error}")
            else:
                if head is not None and head not in book.hashes:
                    self._reader.look()  # the trainer may have written both between our two looks
                    if head not in book.hashes:
                        found.append(
                            "The ledger does not hold the head of its anchor: it was set back, or lines are gone"
                        )
                if head is None and book.seq:
                    found.append(f"The ledger's anchor {policy.anchor} is missing")
        return found

    def _warnings(self, policy: Policy, now: float) -> list[str]:
        found = [self._policy_problem] if self._policy_problem else []
        if policy.has_expired(now):
            found.append("The policy has expired: every request is refused until it is renewed")
        return found


def _release(moment: float, use: Use) -> Release:
    return Release(moment, use.run_id, use.server_round, use.dataset, use.coordinator, STATES[use.state], use)


def _dataset(name: str, allowed: DatasetPolicy, book: Book) -> Dataset:
    epsilon, delta = book.spent(name, allowed.group)
    runs = []
    for moment, item in book.runs_of(name):
        began = book.began(item.coordinator, item.run_id, name)
        events = [use.event for use in began if use.event is not None]
        released = None
        if item.is_private and len(events) == len(began):
            released = charge(events, relation=item.relation, delta=item.delta).epsilon
        states = [use.state for use in began]
        runs.append(
            Run(
                moment, item.coordinator, item.run_id, item.epsilon, item.delta, released, len(item.envelope.events),
                states.count(State.REPLIED), states.count(State.LOST),
            )
        )  # fmt: skip
    return Dataset(name, allowed, epsilon, delta, tuple(runs))


def _versioned(found: Snapshot) -> Snapshot:
    """The same with a version that changes with anything a reader would see; ages count by the minute."""
    trainer = found.trainer
    seen: Sequence[object] = (
        found.lines, found.last_time, found.alarms, found.warnings, trainer.answers, int(trainer.age_s // 60),
        json.dumps(trainer.status, sort_keys=True, default=str),
        found.policy.model_dump_json(),
    )  # fmt: skip
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    return Snapshot(**{**vars(found), "version": digest})
