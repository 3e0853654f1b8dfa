from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.ledger import Ledger
from common.messages import Envelope
from common.privacy import SampledGaussian
from common.signing import SigningKey
from server.accountant import Budget, EmbeddedAccountant, Registration
from server.accountant_service import serve
from server.remote_accountant import RemoteAccountant

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=100)


@pytest.fixture(scope="session")
def client_key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="session")
def accountant_key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(params=["embedded", "served"])
def reopen(
    request: pytest.FixtureRequest, tmp_path: Path, accountant_key: SigningKey
) -> Iterator[Callable[[], EmbeddedAccountant | RemoteAccountant]]:
    """Another accountant on the same ledger, as after a restart or in a second process; in-process or over gRPC."""
    with ExitStack() as stack:

        def reopen() -> EmbeddedAccountant | RemoteAccountant:
            embedded = EmbeddedAccountant(stack.enter_context(Ledger(tmp_path / "ledger.sqlite")), accountant_key)
            if request.param == "embedded":
                return embedded
            server, address = serve(embedded, "127.0.0.1:0", tls=None)
            stack.callback(lambda: server.stop(None).wait())
            return stack.enter_context(RemoteAccountant(address, timeout_s=20))

        yield reopen


@pytest.fixture
def accountant(reopen: Callable[[], EmbeddedAccountant | RemoteAccountant]) -> EmbeddedAccountant | RemoteAccountant:
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
