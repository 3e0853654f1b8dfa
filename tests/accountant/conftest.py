from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.ledger import Ledger
from common.messages import Envelope
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Budget, EmbeddedAccountant, Registration

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)


@pytest.fixture(scope="session")
def client_key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="session")
def accountant_key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def reopen(tmp_path: Path, accountant_key: SigningKey) -> Iterator[Callable[[], EmbeddedAccountant]]:
    """Another accountant on the same ledger, as after a restart or in a second process."""
    ledgers: list[Ledger] = []

    def reopen() -> EmbeddedAccountant:
        ledgers.append(Ledger(tmp_path / "ledger.sqlite"))
        return EmbeddedAccountant(ledgers[-1], accountant_key)

    yield reopen
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def accountant(reopen: Callable[[], EmbeddedAccountant]) -> EmbeddedAccountant:
    return reopen()


@pytest.fixture
def registration(client_key: SigningKey) -> Callable[..., Registration]:
    """A registration for ``rounds`` rounds of EVENT, with room in the budget; options replace its parts."""

    def make(
        rounds: int = 3, *, dataset: str = "notes", group: str | None = None, event=EVENT, **budget
    ) -> Registration:
        values = {"target_epsilon": 2.0, "target_delta": 1e-5, **budget}
        return Registration(dataset, Budget(**values), Envelope((event,) * rounds), client_key.public_key, group)

    return make
