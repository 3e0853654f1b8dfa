"""Run by Alembic: migrations happen in the caller's transaction, on the caller's connection."""

from alembic import context

from common.ledger_schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table="ledger_schema_version",
)
context.run_migrations()
