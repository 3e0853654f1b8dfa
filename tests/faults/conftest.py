"""Three federations for the whole table: starting one costs more than a row."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from line import Line
from postgres import Postgres
from table import Standing
from volume import Volume

sys.path.insert(0, str(Path(__file__).parents[1] / "deployment"))
from loopback import Loopback
from secured import Secured


class OneCanBeCutOff(Loopback):
    """East's node reaches the coordinator by a line that can be cut; its ledger lies on a volume that can be full."""

    def __init__(self, *arguments, volume, **options):
        self.volume, self.line = volume, None
        super().__init__(*arguments, **options)

    def address_for(self, name):
        if name != "east":
            return self.address
        self.line = self.line or Line(self.address)
        return self.line.address

    def client_ledger(self, name):
        if name != "east":
            return super().client_ledger(name)
        return self.volume.folder / f"{self.folder.name}.sqlite"

    def trainer_lines(self, name):
        return f'ledger = "{self.client_ledger(name)}"\n'

    def stop(self):
        if self.line is not None:
            self.line.mend()
        super().stop()
        if self.line is not None:
            self.line.close()


class OnAVolume(Secured):
    """The accountant's ledger lies on a volume that can be full."""

    def __init__(self, folder, *arguments, volume, **options):
        self.volume = volume
        super().__init__(folder, *arguments, ledger=volume.folder / f"{folder.name}.sqlite", **options)


@pytest.fixture(scope="session")
def volume(tmp_path_factory):
    made = Volume(tmp_path_factory.mktemp("faults") / "volume")
    yield made
    made.free()
    made.close()


@pytest.fixture(scope="session")
def plain(tmp_path_factory, volume):
    """In plain HTTP, with the accountant inside the ServerApp."""
    standing = Standing(OneCanBeCutOff, lambda: tmp_path_factory.mktemp("plain"), volume=volume)
    yield standing
    standing.close()


@pytest.fixture(scope="session")
def secured(tmp_path_factory, volume):
    """With kits, TLS, the door, and an accountant service on a SQLite file."""
    standing = Standing(OnAVolume, lambda: tmp_path_factory.mktemp("secured"), volume=volume)
    yield standing
    standing.close()


@pytest.fixture(scope="session")
def on_postgres(tmp_path_factory):
    """The same on PostgreSQL; gives the federation and the server."""
    with Postgres() as server:
        standing = Standing(Secured, lambda: tmp_path_factory.mktemp("on-postgres"), ledger=server.url)
        yield standing, server
        standing.close()
