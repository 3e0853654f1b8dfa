"""The migrated schema is the program's own schema, on both kinds of storage."""

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from common.errors import InvalidInput, Unavailable
from common.ledger import Ledger
from common.ledger_schema import METADATA, create_engine
from deploy.migrations import upgrade


def differences(storage):
    _, engine = create_engine(storage, read_only=False)
    try:
        with engine.connect() as connection:
            options = {"version_table": "ledger_schema_version"}
            return compare_metadata(MigrationContext.configure(connection, opts=options), METADATA)
    finally:
        engine.dispose()


def triggers(storage):
    _, engine = create_engine(storage, read_only=False)
    postgres = "SELECT DISTINCT trigger_name FROM information_schema.triggers"
    query = postgres if engine.dialect.name == "postgresql" else "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    try:
        with engine.connect() as connection:
            return {name for (name,) in connection.execute(sa.text(query))}
    finally:
        engine.dispose()


def test_the_migrated_schema_is_the_programs_schema(storage, tmp_path):
    upgrade(storage)
    assert differences(storage) == []
    migrated = triggers(storage)
    assert migrated
    with Ledger(storage) as ledger:
        ledger.append("a", "s", {"x": 1})
        with pytest.raises(Unavailable, match="append-only"), ledger.exclusive() as connection:
            connection.execute(sa.text("UPDATE ledger_entries SET body = '{}'"))
    assert triggers(storage) == migrated
    if "://" not in storage:
        other = str(tmp_path / "own.sqlite")
        with Ledger(other):
            assert triggers(other) == migrated


def test_a_ledger_that_the_program_made_is_left_as_it_is(storage):
    with Ledger(storage) as ledger:
        head = ledger.append("a", "s", {"x": 1}).hash
    upgrade(storage)
    upgrade(storage)
    assert differences(storage) == []
    with Ledger(storage) as ledger:
        assert ledger.verify(anchor=head) == 1


def test_other_databases_and_absent_servers_are_named():
    with pytest.raises(InvalidInput, match="not supported"):
        upgrade("mysql://host/name")
    with pytest.raises(Unavailable, match="cannot be upgraded"):
        upgrade("postgresql+psycopg://nobody@127.0.0.1:1/none")
