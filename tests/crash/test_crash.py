"""Random ``kill -9`` of accountant, coordinator and organisations: afterwards no book says less than the truth.

``CLOISTER_KILLS`` sets how many (20 by default; 200 for a release), ``CLOISTER_CRASH_SEED`` which. Every kill is logged
with its time and victim (``pytest -s``).
"""

import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest

from common.charge import charge
from common.ledger import Ledger
from common.signing import SigningKey

sys.path.insert(0, str(Path(__file__).parent))
import federation

KILLS = int(os.environ.get("CLOISTER_KILLS", "20"))
ROUNDS = 25


class Killer:
    """Starts the processes, kills them, starts them again, and counts."""

    def __init__(self, folder, seed, rounds):
        self.folder, self.random = folder, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["federation"])
        self.programs = {
            "accountant": (federation.accountant, (str(folder),)),
            "coordinator": (federation.coordinator, (str(folder), rounds)),
            **{name: (federation.organisation, (str(folder), name)) for name in federation.NAMES},
        }
        self.processes = {}
        self.kills = []

    def start(self, name):
        target, arguments = self.programs[name]
        process = self.context.Process(target=target, args=arguments, name=name, daemon=True)
        process.start()
        self.processes[name] = process

    def is_finished(self):
        return (self.folder / "finished").exists()

    def run(self, kills, limit_s):
        """Kill at random moments until ``kills`` are done or the run ends; then let it end."""
        deadline = time.monotonic() + limit_s
        for name in self.programs:
            self.start(name)
        while not self.is_finished():
            assert time.monotonic() < deadline, f"the run did not end; kills: {self.kills}"
            if len(self.kills) < kills:
                self.await_progress()
                time.sleep(self.random.uniform(0.0, 0.3))
                self.kill(self.random.choice(list(self.programs)))
            else:
                time.sleep(0.05)
                self.revive()
        self.stop()

    def await_progress(self, limit_s=60):
        """Until somebody has written something since the last kill: it is a running federation that is hit."""
        before, deadline = self.written(), time.monotonic() + limit_s
        while self.written() == before and not self.is_finished() and time.monotonic() < deadline:
            time.sleep(0.01)
            self.revive()

    def written(self):
        """How far each organisation's witness and the round's checkpoint have come."""
        paths = [self.folder / f"{name}.witness" for name in federation.NAMES] + [self.folder / "checkpoint.npz"]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]

    def kill(self, name):
        process = self.processes[name]
        was_alive, before = process.is_alive(), time.time()
        process.kill()
        process.join()
        if was_alive:
            self.kills.append((before, time.time(), name))
        if not self.is_finished():
            self.start(name)
        self.revive()

    def revive(self):
        """Whoever ended by an error of somebody else's death is started again, as a supervisor would."""
        for name, process in list(self.processes.items()):
            if not process.is_alive() and not self.is_finished():
                self.start(name)

    def stop(self):
        for process in self.processes.values():
            process.kill()
            process.join()


def lines(path):
    return path.read_text().split() if path.exists() else []


def open_at_a_kill(ledger, kills):
    """The reservations of rounds that were open when somebody was killed: reserved before, and not yet committed."""
    reserved, committed = {}, {}
    for entry in ledger.entries():
        if entry.kind == "reserve":
            reserved[entry.body["reservation"]["reservation_id"]] = entry.time
        for reservation_id in entry.body.get("outcomes", ()):
            committed.setdefault(reservation_id, entry.time)
    return {
        reservation_id
        for reservation_id, since in reserved.items()
        if any(since <= after and before <= committed.get(reservation_id, math.inf) for before, after, _ in kills)
    }


def check_books(folder, kills):
    """Every witness agrees: nobody trained twice, both books hold the truth, and at most the open round of a kill more.

    Exactly: what a book counts and nobody trained was reserved, and not yet committed, at the moment of a kill. A run
    has one open round at a time, so one kill costs an organisation one event at most.
    """
    from client.journal import Journal
    from server.accountant import EmbeddedAccountant

    coordinator = SigningKey.load(folder / "keys" / "coordinator").public_key
    with Ledger(federation.storage(folder)) as ledger:
        excused = open_at_a_kill(ledger, kills)
        accountant = EmbeddedAccountant(ledger, SigningKey.load(folder / "keys" / "accountant"))
        assert accountant.open("run") == ()
        for name in federation.NAMES:
            truth = lines(folder / f"{name}.witness")
            assert len(set(truth)) == len(truth), f"{name} trained twice under one reservation"
            counted = {item.reservation_id: item.event for item in accountant.attested("run", name)}
            assert set(truth) <= set(counted), f"{name}: the coordinator's book says less than the truth"
            spent = accountant.spent("run", name).epsilon
            assert spent >= charge([federation.EVENT] * len(truth), relation="add_remove", delta=1e-5).epsilon
            extra = set(counted) - set(truth)
            assert extra <= excused, f"{name}: charged for a round that no kill had found open"
            assert len(extra) <= len(kills), f"{name}: more than one round for each kill"
            with Ledger(folder / f"{name}.sqlite", read_only=True) as own:
                own.verify(anchor=(folder / f"{name}.head").read_text().strip())
                journal = Journal(own)
                journal.catch_up()
            began = {use.reservation_id for use in journal.began(coordinator, "run", "notes")}
            assert set(truth) <= began, f"{name}: its own book says less than the truth"
            own_kills = sum(victim == name for _, _, victim in kills)
            assert len(began - set(truth)) <= own_kills, f"{name}: its book counts what no kill of it explains"
            assert began <= set(counted), f"{name}: the coordinator's book does not know what began"
            charged, _ = journal.spent("notes", None)
            assert charged >= spent


def run_federation(folder, kills, seed, rounds=ROUNDS, storage=None):
    folder.mkdir()
    federation.make_keys(folder)
    if storage is not None:
        (folder / "storage").write_text(storage)
    killer = Killer(folder, seed, rounds)
    try:
        killer.run(kills, limit_s=600)
    finally:
        killer.stop()
    assert (folder / "finished").read_text() == str(rounds + 1)
    check_books(folder, killer.kills)
    print(f"seed {seed}: killed {[(round(before, 3), name) for before, _, name in killer.kills]}")
    return len(killer.kills)


def test_a_federation_with_a_few_kills_ends_with_true_books(tmp_path):
    assert run_federation(tmp_path / "run", 2, seed=1, rounds=6) >= 1


def test_a_federation_on_postgresql_with_a_few_kills_ends_with_true_books(tmp_path, postgres_url):
    assert run_federation(tmp_path / "run", 1, seed=2, rounds=3, storage=postgres_url) == 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_kills_on_postgresql_never_make_a_book_say_less_than_the_truth(tmp_path, postgres_database):
    done, seed = 0, int(os.environ.get("CLOISTER_CRASH_SEED", "100"))
    while done < max(1, KILLS // 4):
        with postgres_database() as url:
            done += run_federation(tmp_path / f"run-{seed}", min(10, KILLS), seed, storage=url)
        seed += 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_random_kills_never_make_a_book_say_less_than_the_truth(tmp_path):
    done, seed = 0, int(os.environ.get("CLOISTER_CRASH_SEED", "100"))
    while done < KILLS:
        done += run_federation(tmp_path / f"run-{seed}", min(10, KILLS - done), seed)
        seed += 1
