"""A checkpoint is whole or refused, and a crash while it is written leaves the old one."""

import os

import numpy as np
import pytest

from common.errors import LedgerCorrupt, Unavailable
from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint, write_atomically

PLAN = "p" * 64


def state(server_round=3) -> Checkpoint:
    return Checkpoint(
        PLAN,
        server_round,
        {"a/b": np.arange(3, dtype=np.float32)},
        {"steps": np.asarray(3), "first/a/b": np.ones(3)},
        ({"round": 0, "score": None}, {"round": 1, "score": 0.5}),
        ("clinic",),
    )


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(state(), path)
    found = checkpoints.load(path, PLAN)
    assert (found.server_round, found.metrics, found.left) == (3, state().metrics, ("clinic",))
    for ours, theirs in ((state().adapter, found.adapter), (state().optimizer, found.optimizer)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_no_file_is_no_checkpoint(tmp_path):
    assert checkpoints.load(tmp_path / "none.npz", PLAN) is None


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(Checkpoint(PLAN, 1, {"a": np.ones(1, np.float32)}, {}), path)
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x01]) + whole[index + 1 :])
        with pytest.raises(LedgerCorrupt):
            checkpoints.load(path, PLAN)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(LedgerCorrupt):
            checkpoints.load(path, PLAN)
    path.write_bytes(whole)
    assert checkpoints.load(path, PLAN).server_round == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(state(), path)
    with pytest.raises(LedgerCorrupt, match="other terms"):
        checkpoints.load(path, "q" * 64)


def test_a_pickle_is_never_read(tmp_path):
    import hashlib
    import io

    buffer = io.BytesIO()
    np.savez(buffer, header=np.array([{"plan_hash": PLAN}], dtype=object))
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(LedgerCorrupt, match="not a checkpoint"):
        checkpoints.load(path, PLAN)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(state(), path)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 100)
    with pytest.raises(LedgerCorrupt, match="larger"):
        checkpoints.load(path, PLAN)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(state(3), path)

    def power_cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, power_cut)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(state(4), path)
    assert checkpoints.load(path, PLAN).server_round == 3
    checkpoints.save(state(5), path)
    assert checkpoints.load(path, PLAN).server_round == 5
    assert os.listdir(tmp_path) == ["checkpoint.npz"], "what the crash left is overwritten, it does not pile up"


def test_a_full_disk_leaves_the_old_one_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.npz"
    checkpoints.save(state(3), path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="No space left"):
            checkpoints.save(state(4), path)
    assert checkpoints.load(path, PLAN).server_round == 3
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_a_folder_that_is_gone_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="cannot be written"):
        write_atomically(tmp_path / "gone" / "file", b"x")
