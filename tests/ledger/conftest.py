"""A ledger on each kind of storage; PostgreSQL is started by ``tests/conftest.py``, or its tests are skipped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.ledger import Ledger


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty ledger can be opened."""
    return str(tmp_path / "ledger.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def open_ledger(storage: str) -> Iterator[Callable[..., Ledger]]:
    """Open the same storage any number of times; all are closed at the end."""
    opened: list[Ledger] = []

    def open_one(**options: object) -> Ledger:
        opened.append(Ledger(storage, **options))
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    return open_ledger()
