"""The table of lines, its indexes, and the triggers that refuse to change a line.

Written out, not taken from ``common/ledger_schema.py``: what a revision did must never change afterwards.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SQLITE = [
    f"CREATE TRIGGER ledger_entries_no_{verb} BEFORE {verb.upper()} ON ledger_entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    for verb in ("update", "delete")
]
POSTGRES = [
    "CREATE OR REPLACE FUNCTION ledger_entries_frozen() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
    "CREATE TRIGGER ledger_entries_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries "
    "FOR EACH STATEMENT EXECUTE FUNCTION ledger_entries_frozen()",
]


def upgrade() -> None:
    """Create what is missing; a ledger that the program made by itself has it all."""
    connection = op.get_bind()
    if sa.inspect(connection).has_table("ledger_entries"):
        return
    op.create_table(
        "ledger_entries",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_us", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=True),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("salt", sa.Text, nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
    )
    op.create_index("ledger_entries_key", "ledger_entries", ["key"], unique=True)
    op.create_index("ledger_entries_previous", "ledger_entries", ["previous"], unique=True)
    op.create_index("ledger_entries_scope", "ledger_entries", ["scope", "seq"])
    for statement in POSTGRES if connection.dialect.name == "postgresql" else SQLITE:
        op.execute(statement)


def downgrade() -> None:
    """A ledger is never taken apart."""
    raise NotImplementedError("a ledger is append-only: there is no way back from its first schema")
