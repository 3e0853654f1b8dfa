"""The ledger's schema, step by step (Alembic): for a database server that is shared and upgraded.

``upgrade(url)`` brings a ledger to the newest schema; ``cloister ledger migrate URL`` calls it. A ledger that a
program created by itself is recognised and left as it is.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError

from common.errors import Unavailable
from common.ledger_schema import create_engine


def upgrade(url_or_path: str | Path, *, revision: str = "head") -> None:
    """Bring the ledger's schema to ``revision``; nothing changes where it is there already.

    Raises:
        InvalidInput: another database system than SQLite or PostgreSQL.
        Unavailable: the database cannot be reached or changed.
    """
    name, engine = create_engine(url_or_path, read_only=False)
    try:
        with engine.execution_options(cloister_writing=True).begin() as connection:
            command.upgrade(config(connection), revision)
    except DBAPIError as error:
        raise Unavailable(f"the ledger {name} cannot be upgraded: {error.orig}") from error
    finally:
        engine.dispose()


def config(connection: sa.Connection) -> Config:
    """Alembic's settings for an open connection."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings
