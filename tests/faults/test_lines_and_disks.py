"""A network that is cut and a disk that is full, in the middle of a round of real processes."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from line import Line
from table import ROUNDS, check_books, finish, resume, second_round, settle
from volume import Volume

sys.path.insert(0, str(Path(__file__).parents[1] / "deployment"))
from loopback import Loopback
from secured import Secured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


class Lined(Loopback):
    """East's node reaches the coordinator by a line that can be cut."""

    line = None

    def address_for(self, name):
        if name != "east":
            return self.address
        self.line = self.line or Line(self.address)
        return self.line.address

    def stop(self):
        if self.line is not None:
            self.line.mend()
        super().stop()
        if self.line is not None:
            self.line.close()


def test_a_network_that_is_cut_for_30_s_costs_one_update_at_most(tmp_path):
    """Flower notices a dead node after 55 s: this one is not dead."""
    with second_round(Lined, tmp_path, quorum=1) as federation:
        federation.line.cut()
        time.sleep(30)
        federation.line.mend()
        settle(federation)
        assert finish(federation)["round"] == ROUNDS
        check_books(federation, lost=1)


def test_a_network_that_is_cut_for_5_minutes_stops_the_run_which_goes_on_when_it_is_back(tmp_path):
    """With a quorum of both, the run waits, says who is absent, and can be resumed: no round is made without east."""
    with second_round(Lined, tmp_path, quorum=2) as federation:
        federation.line.cut()
        mended = time.monotonic() + 300
        ended = federation.wait_end(federation.run, 400)
        assert (ended["state"], ended["exit_code"]) == ("failed", 7), ended
        assert "absent: east" in ended["error"]
        time.sleep(max(0.0, mended - time.monotonic()))
        federation.line.mend()
        resume(federation)
        assert finish(federation, resumes=1)["round"] == ROUNDS
        check_books(federation, lost=1)


@pytest.fixture
def volume(tmp_path):
    made = Volume(tmp_path / "volume")
    yield made
    made.free()
    made.close()


def test_a_full_disk_under_the_accountants_ledger_stops_the_run_and_loses_nothing(tmp_path, volume):
    with second_round(Secured, tmp_path, ledger=volume.folder / "ledger.sqlite") as federation:
        volume.fill(federation.processes["accountant"].pid)
        ended = federation.wait_end(federation.run, 400)
        assert (ended["state"], ended["exit_code"]) == ("failed", 7), ended
        volume.free()
        resume(federation)
        assert finish(federation)["round"] == ROUNDS
        check_books(federation, lost=1)


class OnAVolume(Loopback):
    """East keeps its own ledger, and with it the replies, on a volume that can be filled."""

    def __init__(self, *arguments, volume, **options):
        self.volume = volume
        super().__init__(*arguments, **options)

    def client_ledger(self, name):
        return self.volume.folder / "ledger.sqlite" if name == "east" else super().client_ledger(name)

    def trainer_lines(self, name):
        return f'ledger = "{self.client_ledger(name)}"\n'


def test_a_full_disk_under_an_organisations_ledger_costs_its_round_and_nothing_is_trained_unwritten(tmp_path, volume):
    with second_round(OnAVolume, tmp_path, volume=volume) as federation:
        volume.fill(federation.processes["east-trainer"].pid)
        said = f"round 2/{ROUNDS}: east:"
        federation.wait("round 2 has its answer", lambda: said in federation.run_log(federation.run), 300)
        volume.free()
        assert finish(federation)["round"] == ROUNDS
        check_books(federation, lost=1)
