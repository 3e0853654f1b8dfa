"""A PostgreSQL server of the test's own that can be killed and started again on the same data."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from deploy.running.doctor import free_port

STARTS = 10


def binaries():
    """The folder of initdb and pg_ctl: the newest of /usr/lib/postgresql, or that of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    initdb = shutil.which("initdb")
    return found[-1].parent if found else (Path(initdb).resolve().parent if initdb else None)


class Postgres:
    """With a database ``cloister`` and durable writes: what it has confirmed must be there after ``kill -9``."""

    def __init__(self):
        self._binaries = binaries()
        if self._binaries is None:
            pytest.skip("PostgreSQL is not installed (no initdb in /usr/lib/postgresql/*/bin or on the PATH)")
        self._as = []
        if os.geteuid() == 0:  # the server refuses root
            self._as = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
        self.port = free_port()

    @property
    def url(self):
        return f"postgresql+psycopg://cloister@127.0.0.1:{self.port}/cloister"

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="cloister-pg-", dir="/tmp"))
        if self._as:
            shutil.chown(self.folder, "nobody", "nogroup")
        self._run("initdb", "-D", self.folder / "data", "-A", "trust", "-U", "cloister", "-E", "UTF8")
        self.start()
        with psycopg.connect(f"postgresql://cloister@127.0.0.1:{self.port}/postgres", autocommit=True) as admin:
            admin.execute("CREATE DATABASE cloister")
        return self

    def __exit__(self, *_):
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "stop", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        """As a service manager does: again, for a while, until the processes of a killed server have ended too."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c shared_memory_type=mmap"
        command = ("pg_ctl", "-D", self.folder / "data", "-w", "-t", "120", "-l", self.folder / "log", "-o", options)
        for _ in range(STARTS - 1):
            if self._run(*command, "start", check=False) == 0:
                return
            time.sleep(1)
        self._run(*command, "start")

    def kill(self):
        """``kill -9`` of the server's first process, until it is gone: while its number exists no other one starts."""
        first = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{first}").exists():
            assert time.monotonic() < deadline, "the killed server is still there"
            time.sleep(0.05)

    def _run(self, name, *arguments, check=True):
        command = [*self._as, str(self._binaries / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=180)
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done.returncode
