"""A PostgreSQL role that may read the accountant's ledger and do nothing else: the dashboard's.

Guarantees, held by the server and not by our programs:
    * it reads the ledger's tables; it changes, empties, creates and owns nothing, neither tables nor large objects;
    * it takes no advisory lock, so it cannot keep the accountant from writing (whose lock is one);
    * it has few connections, so it cannot use up the server's;
    * its password is sent as a SCRAM verifier, so no log of statements holds it.

Taking the last two kinds of right from everybody needs a superuser; elsewhere ``make_reader`` says what is left open.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from common.errors import InvalidInput, Unavailable
from common.ledger import Ledger
from common.ledger_schema import METADATA
from deploy.provisioning.private_files import read_small, write_private

if TYPE_CHECKING:
    import psycopg

WRITER, READER = "writer.password", "reader.password"
CONNECTIONS = 20
_ROLE = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_PASSWORD = re.compile(r"[!-~]{16,256}")

_OPEN_TO_ALL = """
SELECT oid::regprocedure::text FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace
  AND (proname LIKE 'pg\\_%advisory%' OR proname LIKE 'lo\\_%' OR proname IN ('lowrite', 'loread'))
"""
"""Functions that every role may call and a reader must not: locks that the writer waits for, and objects of its own."""


def make_passwords(folder: Path) -> None:
    """Passwords of the database's two roles, made here and never changed: whoever replaces one removes the file first.

    Raises:
        Unavailable: they cannot be written.
    """
    for name in (WRITER, READER):
        if not (folder / name).exists():
            write_private(folder / name, secrets.token_urlsafe(32).encode())


def read_password(path: Path) -> str:
    """The password that a file holds, and nothing else.

    Raises:
        InvalidInput: it is no readable file, or what it holds is shorter than 16 characters or no plain text.
    """
    text = read_small(path, 1024).decode("ascii", errors="replace").strip()
    if not _PASSWORD.fullmatch(text):
        raise InvalidInput(f"{path}: a password has 16 to 256 letters, digits and signs, without blanks")
    return text


def make_reader(url: str, role: str, password: str) -> bool:
    """Make the role, or set it right again; the ledger's table is made where it is missing.

    Args:
        url: of the ledger, as its owner.
        role: its name.
        password: for it.

    Returns:
        Whether advisory locks and large objects could be closed to it, which needs a superuser.

    Raises:
        InvalidInput: this is no PostgreSQL ledger, the name cannot be a role's, or the role owns something or may more
            than read.
        Unavailable: the server cannot be reached, or refuses.
    """
    if not _ROLE.fullmatch(role):
        raise InvalidInput(f"{role!r}: a role has small letters, digits and underscores")
    try:
        target = sa.make_url(url)
    except ArgumentError as error:
        raise InvalidInput(f"{url!r} is no database URL") from error
    if target.get_backend_name() != "postgresql":
        raise InvalidInput("only a ledger in PostgreSQL has roles; a SQLite file is mounted for reading alone")
    if target.username == role:
        raise InvalidInput(f"{role} is the role that writes the ledger: name another one")
    Ledger(url).close()  # makes the table
    import psycopg

    try:
        address = target.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(address) as connection:
            return _grant(connection, role, password)
    except psycopg.Error as error:
        raise Unavailable(f"the role {role} cannot be made: {error}") from error


def _grant(connection: psycopg.Connection[Any], role: str, password: str) -> bool:
    """All in one transaction: a role that has a part of its limits is never there."""
    from psycopg import sql

    name = sql.Identifier(role)
    verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    database = sql.Identifier(connection.info.dbname)
    tables = sql.SQL(", ").join(sql.Identifier("public", table) for table in METADATA.tables)
    known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
    if known is None:
        connection.execute(sql.SQL("CREATE ROLE {}").format(name))
    row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    is_superuser = row is not None and bool(row[0])
    limits = "LOGIN NOCREATEDB NOCREATEROLE NOINHERIT"
    if is_superuser:  # nobody else may name these; a role that has one of them is refused below
        limits += " NOSUPERUSER NOREPLICATION NOBYPASSRLS"
    for statement in (
        sql.SQL("ALTER ROLE {} WITH " + limits + " CONNECTION LIMIT {} PASSWORD {}").format(
            name, sql.Literal(CONNECTIONS), sql.Literal(verifier)
        ),
        sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(name),
        sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database),
        sql.SQL("REVOKE ALL ON SCHEMA public FROM PUBLIC"),
        sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC, {}").format(name),
        sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, name),
        sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(name),
        sql.SQL("GRANT SELECT ON {} TO {}").format(tables, name),
    ):
        connection.execute(statement)
    _refuse_more_than_reading(connection, role)
    if is_superuser:
        _close(connection)
    return is_superuser


def _refuse_more_than_reading(connection: psycopg.Connection[Any], role: str) -> None:
    """A role that existed may be a member of others, or own something; then it is none for reading."""
    query = """
        SELECT (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)
             + (SELECT count(*) FROM pg_class WHERE relowner = r.oid)
             + (SELECT count(*) FROM pg_namespace WHERE nspowner = r.oid)
             + (SELECT count(*) FROM pg_database WHERE datdba = r.oid)
             + (r.rolsuper OR r.rolreplication OR r.rolbypassrls)::int
        FROM pg_roles r WHERE rolname = %s
    """
    row = connection.execute(query, (role,)).fetchone()
    if row is None or row[0]:
        connection.rollback()
        raise InvalidInput(f"{role} owns something, or is a member of other roles: name one that nobody has")


def _close(connection: psycopg.Connection[Any]) -> None:
    """Take from everybody what a reader could keep the writer waiting with; a superuser needs no grant of it."""
    from psycopg import sql

    for (function,) in connection.execute(_OPEN_TO_ALL).fetchall():
        connection.execute(sql.SQL("REVOKE EXECUTE ON FUNCTION {} FROM PUBLIC").format(sql.SQL(function)))
