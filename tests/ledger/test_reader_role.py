"""The dashboard's role on a real PostgreSQL server: it reads the ledger, and the server forbids everything else."""

import re
import threading

import psycopg
import pytest
from typer.testing import CliRunner

from common.errors import InvalidInput, Refused, Unavailable
from common.ledger import Ledger
from common.ledger_schema import LOCK_KEY
from deploy.cli import app
from deploy.provisioning.database import CONNECTIONS, READER, WRITER, make_passwords, make_reader, read_password

PASSWORD = "a-password-of-the-reader"


@pytest.fixture
def role(postgres_url):
    """A role's name of this test's own (roles belong to the server, not to a database), gone at the end."""
    name = f"reader_{postgres_url.rpartition('/')[2]}"
    yield name
    with psycopg.connect(plain(postgres_url), autocommit=True) as admin:
        if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)).fetchone():
            admin.execute(f"DROP OWNED BY {name}")
            admin.execute(f"DROP ROLE {name}")


def plain(url):
    return url.replace("+psycopg", "")


def as_role(url, name):
    return re.sub("//cloister@", f"//{name}:{PASSWORD}@", url)


@pytest.fixture
def reader(postgres_url, role):
    """The URL of a ledger with three lines, for the role that reads."""
    with Ledger(postgres_url) as ledger:
        for number in range(3):
            ledger.append("reserve", "run-1", {"number": number})
    assert make_reader(postgres_url, role, PASSWORD)
    return as_role(postgres_url, role)


def test_it_reads_and_verifies_the_whole_ledger(reader):
    with Ledger(reader, read_only=True) as ledger:
        assert ledger.verify() == 3
        with pytest.raises(Refused, match="reading only"):
            ledger.append("reserve", "run-1", {})


FORBIDDEN = (
    "INSERT INTO ledger_entries SELECT 4, time_us, kind, scope, 'k', body, salt, hash, 'x' FROM ledger_entries LIMIT 1",
    "UPDATE ledger_entries SET body = '{}'",
    "DELETE FROM ledger_entries",
    "TRUNCATE ledger_entries",
    "DROP TABLE ledger_entries",
    "ALTER TABLE ledger_entries DISABLE TRIGGER ALL",
    "CREATE TABLE mine (x int)",
    "CREATE TEMPORARY TABLE mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE INDEX mine ON ledger_entries (kind)",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "BEGIN; LOCK TABLE ledger_entries IN EXCLUSIVE MODE",
    "BEGIN; LOCK TABLE ledger_entries IN ROW EXCLUSIVE MODE",
    "SELECT * FROM ledger_entries FOR UPDATE",
    "SELECT * FROM ledger_entries FOR SHARE",
    f"SELECT pg_advisory_lock({LOCK_KEY})",
    f"SELECT pg_try_advisory_xact_lock({LOCK_KEY})",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "COPY ledger_entries TO PROGRAM 'cat'",
    "COPY ledger_entries TO '/tmp/ledger.copy'",
    "SELECT * FROM pg_authid",
    "SET ROLE cloister",
    "SET SESSION AUTHORIZATION cloister",
    "SELECT pg_reload_conf()",
    "SELECT pg_read_file('PG_VERSION')",
)


def test_the_server_forbids_it_everything_else(reader, postgres_url):
    """Also once it has told its session that it may write, which every role may."""
    with psycopg.connect(plain(reader), autocommit=True) as session:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            session.execute("CREATE TABLE mine (x int)")
        session.execute("SET default_transaction_read_only = off")
        allowed = []
        for statement in FORBIDDEN:
            try:
                session.execute(statement)
                allowed.append(statement)
            except psycopg.errors.InsufficientPrivilege:
                session.execute("ROLLBACK")
        assert allowed == []
    with Ledger(postgres_url) as ledger:
        assert ledger.verify() == 3


def test_it_cannot_end_or_cancel_the_writer(reader, postgres_url):
    with psycopg.connect(plain(postgres_url), autocommit=True) as writer, psycopg.connect(plain(reader)) as session:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("SELECT pg_terminate_backend(%s)", (writer.info.backend_pid,))
        assert writer.execute("SELECT 1").fetchone() == (1,)


def test_a_reader_that_keeps_a_transaction_open_blocks_no_writer(reader, postgres_url):
    with psycopg.connect(plain(reader)) as session:
        session.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
        session.execute("BEGIN; LOCK TABLE ledger_entries IN ACCESS SHARE MODE")
        assert session.execute("SELECT count(*) FROM ledger_entries").fetchone() == (3,)
        written = []

        def write():
            with Ledger(postgres_url) as ledger:
                written.append(ledger.append("reserve", "run-1", {"number": 3}))

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(timeout=60)
        assert len(written) == 1


def test_its_connections_are_few(reader, postgres_url, role):
    with psycopg.connect(plain(postgres_url)) as admin:
        row = admin.execute(
            "SELECT rolconnlimit, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, rolinherit "
            "FROM pg_roles WHERE rolname = %s",
            (role,),
        ).fetchone()
    assert row == (CONNECTIONS, *[False] * 6)


def test_it_is_set_right_again_and_its_password_changed(reader, postgres_url, role):
    with psycopg.connect(plain(postgres_url), autocommit=True) as admin:
        admin.execute(f"GRANT INSERT ON ledger_entries TO {role}")
        admin.execute(f"ALTER ROLE {role} CREATEDB")
        before = admin.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone()
        make_reader(postgres_url, role, "another-password-of-it")
        after = admin.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone()
    assert after != before
    assert after[0].startswith("SCRAM-SHA-256$")
    with psycopg.connect(plain(reader), autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        for statement in (FORBIDDEN[0], "CREATE DATABASE mine"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(statement)


def test_a_role_that_may_more_than_read_is_refused(postgres_url, role):
    with psycopg.connect(plain(postgres_url), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role}")
        admin.execute(f"GRANT pg_read_all_data TO {role}")
    with pytest.raises(InvalidInput, match="member of other roles"):
        make_reader(postgres_url, role, PASSWORD)
    with pytest.raises(InvalidInput, match="writes the ledger"):
        make_reader(postgres_url, "cloister", PASSWORD)
    with pytest.raises(InvalidInput, match="small letters"):
        make_reader(postgres_url, 'x"; DROP TABLE ledger_entries; --', PASSWORD)


def test_without_a_superuser_it_says_what_is_left_open(postgres_url, role, tmp_path):
    owner = f"owner_{postgres_url.rpartition('/')[2]}"
    database = postgres_url.rpartition("/")[2]
    with psycopg.connect(plain(postgres_url), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {owner} LOGIN CREATEROLE")
        admin.execute(f"ALTER DATABASE {database} OWNER TO {owner}")
        admin.execute(f"ALTER SCHEMA public OWNER TO {owner}")
    try:
        url = postgres_url.replace("//cloister@", f"//{owner}@")
        (tmp_path / "password").write_text(PASSWORD + "\n")
        arguments = ["ledger", "reader", url, "--role", role, "--password-file", str(tmp_path / "password")]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "no superuser" in done.output
        with psycopg.connect(plain(as_role(postgres_url, role)), autocommit=True) as session:
            session.execute("SET default_transaction_read_only = off")
            for statement in ("CREATE TABLE mine (x int)", FORBIDDEN[0]):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(statement)
    finally:
        with psycopg.connect(plain(postgres_url), autocommit=True) as admin:
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"REASSIGN OWNED BY {owner} TO cloister")
            admin.execute(f"DROP OWNED BY {owner}")
            admin.execute(f"DROP ROLE {owner}")


def test_passwords_are_made_once_and_read_strictly(tmp_path):
    make_passwords(tmp_path / "postgres")
    first = {name: read_password(tmp_path / "postgres" / name) for name in (WRITER, READER)}
    make_passwords(tmp_path / "postgres")
    assert {name: read_password(tmp_path / "postgres" / name) for name in (WRITER, READER)} == first
    assert first[WRITER] != first[READER]
    assert min(map(len, first.values())) >= 43
    assert all((tmp_path / "postgres" / name).stat().st_mode & 0o777 == 0o600 for name in first)
    for text in ("short", "with a blank in it, though long", "", "ünïcödé-but-long-enough"):
        (tmp_path / "odd").write_text(text)
        with pytest.raises(InvalidInput, match="16 to 256"):
            read_password(tmp_path / "odd")


def test_a_sqlite_ledger_and_a_server_that_is_not_there_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="only a ledger in PostgreSQL"):
        make_reader(f"sqlite:///{tmp_path}/x.sqlite", "reader", PASSWORD)
    with pytest.raises(InvalidInput, match="no database URL"):
        make_reader(str(tmp_path / "x.sqlite"), "reader", PASSWORD)
    with pytest.raises(Unavailable):
        make_reader("postgresql+psycopg://cloister@127.0.0.1:1/cloister", "reader", PASSWORD)
