"""The coordinator's head is kept outside its machine after every change; a ledger that was set back is not served."""

import shutil

import pytest

from common.anchor import FileAnchor
from common.config import RunConfig
from common.errors import LedgerCorrupt, Unavailable
from common.ledger import GENESIS, Ledger
from server.accountant import Ask, EmbeddedAccountant, Outcome
from server.accountants import open_accountant


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder / "head"


@pytest.fixture
def opened(tmp_path, kept, accountant_key):
    """opened() -> an accountant on the one ledger, anchored; the one before is closed. opened.close() closes it."""
    ledgers = []

    def close():
        while ledgers:
            ledgers.pop().close()

    def open_one():
        close()
        ledgers.append(Ledger(tmp_path / "ledger.sqlite"))
        return EmbeddedAccountant(ledgers[-1], accountant_key, anchor=FileAnchor(kept))

    open_one.close = close
    yield open_one
    close()


def play(accountant, number, event):
    """One round; the anchor's content after each of its steps."""
    answer = accountant.reserve("run", number, [Ask("a", event)])
    rid = answer.granted[0].reservation.reservation_id
    yield
    accountant.sending("run", [rid])
    yield
    accountant.commit("run", {rid: Outcome.REPLIED})
    yield


def test_the_anchor_holds_the_head_after_every_change(opened, kept, registration):
    accountant = opened()
    assert kept.read_text().strip() == GENESIS
    accountant.register("run", {"a": registration()})
    heads = {GENESIS, kept.read_text().strip()}
    for _ in play(accountant, 1, registration().envelope.events[0]):
        assert kept.read_text().strip() == accountant.head()
        heads.add(accountant.head())
    assert len(heads) == 5
    assert opened().head() == kept.read_text().strip()


def test_a_ledger_that_was_set_back_or_lost_is_not_opened(opened, kept, registration, tmp_path):
    accountant = opened()
    accountant.register("run", {"a": registration()})
    opened.close()
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "backup.sqlite")
    for _ in play(opened(), 1, registration().envelope.events[0]):
        pass
    opened.close()
    newest = tmp_path / "newest.sqlite"
    shutil.copy(tmp_path / "ledger.sqlite", newest)
    for older in (tmp_path / "backup.sqlite", None):
        for file in tmp_path.glob("ledger.sqlite*"):
            file.unlink()
        if older is not None:
            shutil.copy(older, tmp_path / "ledger.sqlite")
        with pytest.raises(LedgerCorrupt, match="anchored head"):
            opened()
        opened.close()
    shutil.copy(newest, tmp_path / "ledger.sqlite")
    assert opened().spent("run", "a").epsilon > 0
    kept.unlink()
    with pytest.raises(LedgerCorrupt, match="anchor of this ledger is missing"):
        opened()


def test_nothing_is_answered_while_the_anchor_cannot_be_written_and_nothing_is_lost(opened, kept, registration):
    accountant = opened()
    item = registration()
    accountant.register("run", {"a": item})
    kept.unlink()
    kept.parent.rmdir()
    for _ in range(2):
        with pytest.raises(Unavailable, match="anchor"):
            accountant.reserve("run", 1, [Ask("a", item.envelope.events[0])])
    assert len(accountant.spent("run", "a").events) == 1, "what may have been promised counts"
    kept.parent.mkdir()
    answer = accountant.reserve("run", 1, [Ask("a", item.envelope.events[0])])
    assert len(answer.granted) == len(accountant.spent("run", "a").events) == 1
    assert kept.read_text().strip() == accountant.head()


def test_a_ledger_is_never_older_than_its_anchor_whatever_crashes_between_the_two(opened, kept, registration):
    """The line is durable first: after a crash in between the ledger still holds the head of its anchor."""
    accountant = opened()
    accountant.register("run", {"a": registration()})
    before = kept.read_text()
    for _ in play(accountant, 1, registration().envelope.events[0]):
        pass
    kept.write_text(before)  # as if the crash had come before each of the later writes
    assert len(opened().spent("run", "a").events) == 1


def test_the_setting_of_a_run_anchors_the_embedded_ledger(tmp_path, kept, registration):
    config = RunConfig.from_mapping({"accountant-anchor": str(kept)})
    paths = {"ledger": tmp_path / "l.sqlite", "key": tmp_path / "key", "seen": tmp_path / "pub"}
    with open_accountant(config, **paths) as accountant:
        accountant.register("run", {"a": registration()})
        head = accountant.head()
    assert kept.read_text().strip() == head
    (tmp_path / "l.sqlite").unlink()
    with pytest.raises(LedgerCorrupt), open_accountant(config, **paths):
        pass
