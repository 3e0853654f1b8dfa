"""The lock of a run: one works on it, others may look, and looking keeps nobody from beginning."""

import fcntl
import threading
import time

import pytest

from common.errors import Refused
from server.run_lock import held, worked_on


def test_one_at_a_time_and_everybody_may_look(tmp_path):
    assert worked_on(tmp_path) is None
    with held(tmp_path):
        assert worked_on(tmp_path) is True
        with pytest.raises(Refused, match="another process is working"), held(tmp_path):
            pass
    assert worked_on(tmp_path) is False


def test_who_only_looks_refuses_nobody(tmp_path):
    with held(tmp_path):
        pass
    with (tmp_path / "lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        release = threading.Timer(0.2, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        release.start()
        started = time.monotonic()
        with held(tmp_path):
            assert time.monotonic() - started >= 0.1
        release.join()


def test_a_folder_that_cannot_be_written_can_be_looked_at(tmp_path):
    with held(tmp_path):
        (tmp_path / "lock").chmod(0o400)
        assert worked_on(tmp_path) is True
