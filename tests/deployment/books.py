"""What the books of both sides say about a run, read while the processes are there."""

from client.journal import Journal
from common.ledger import Ledger
from common.signing import SigningKey
from server.accountant import EmbeddedAccountant


def began(federation, name, run):
    """The uses that began at an organisation, from its own ledger."""
    coordinator = federation.public_key("coordinator")
    with Ledger(federation.client_ledger(name), read_only=True) as ledger:
        ledger.verify()
        journal = Journal(ledger)
        journal.catch_up()
    return journal.began(coordinator, run, "notes")


def charged(federation, name, run):
    """ε of the envelope that an organisation's own ledger charges for a run."""
    with Ledger(federation.client_ledger(name), read_only=True) as ledger:
        journal = Journal(ledger)
        journal.catch_up()
    return journal.charged[(federation.public_key("coordinator"), run, "notes")].epsilon


def accounted(federation, name, run):
    """What counts in the coordinator's book."""
    with Ledger(federation.ledger, read_only=True) as ledger:
        ledger.verify()
        accountant = EmbeddedAccountant(ledger, SigningKey.load(federation.key_file("accountant")))
        return accountant.attested(run, name)
