"""A folder is replaced as a whole, whenever it is killed; and a resumed run has the records it began with."""

import json
import shutil
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import InvalidInput
from deploy.reporting.folders import recover_folder, replace_folder
from deploy.simulation.simulate import Watcher, quiet_warnings, simulate

WHOLE = {"one": "1", "two": "2"}


def write(version):
    def fill(folder: Path) -> None:
        folder.mkdir()
        for name, text in WHOLE.items():
            (folder / name).write_text(version + text)

    return fill


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()} if folder.exists() else None


def versions(*names):
    return [{name: version + text for name, text in WHOLE.items()} for version in names]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, call):
    """Die before the ``call``-th change of the file system (renames, deletions, writes)."""
    count = 0

    def deadly(real):
        def change(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            return real(*arguments, **options)

        return change

    for owner, name in ((Path, "rename"), (Path, "write_text"), (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))


@pytest.mark.parametrize("had_one", [True, False], ids=["replaced", "first"])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path, had_one):
    folder = tmp_path / "adapter"
    outcomes = []
    for call in range(1, 40):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if had_one:
            replace_folder(folder, write("old "))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, call)
            try:
                replace_folder(folder, write("new "))
            except Killed:
                pass
            else:
                break
        recover_folder(folder)
        assert content(folder) in ([*versions("old ", "new ")] if had_one else [None, *versions("new ")])
        assert [entry.name for entry in tmp_path.iterdir()] == (["adapter"] if folder.exists() else [])
        outcomes.append(content(folder))
    assert call > 5, "it was killed at every step"
    assert versions("new ")[0] in outcomes
    assert (versions("old ")[0] if had_one else None) in outcomes


def test_a_recovery_that_is_killed_is_recovered_by_the_next(tmp_path):
    folder = tmp_path / "adapter"
    for call in range(1, 20):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write("old ")(tmp_path / "adapter.old")
        write("new ")(tmp_path / "adapter.new")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, call)
            try:
                recover_folder(folder)
            except Killed:
                pass
            else:
                break
        recover_folder(folder)
        assert [content(folder)] == versions("new ")
    assert call > 3


class Stop(Watcher):
    def round_started(self, server_round, clients):
        if server_round == 2:
            raise KeyboardInterrupt


def begin(options, tmp_path, material):
    """A run that was interrupted in round 2, on a copy of the data."""
    data = tmp_path / "data"
    shutil.copytree(material.data, data)
    with quiet_warnings(), pytest.raises(KeyboardInterrupt):
        simulate(RunConfig.from_mapping(options(tmp_path / "run", data=str(data))), Stop())
    return data


def test_a_run_goes_on_with_the_same_records_only(options, tmp_path, material, cloister):
    data = begin(options, tmp_path, material)
    file = data / "north.jsonl"
    kept = file.read_text("utf-8")
    lines = kept.splitlines(keepends=True)
    changed = json.loads(lines[5]) | {"completion": "ultramarine"}
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for forged in (
        [*lines[:5], json.dumps(changed) + "\n", *lines[6:]],
        [lines[1], lines[0], *lines[2:]],
        [*lines, lines[0]],
    ):
        file.write_text("".join(forged), "utf-8")
        found = cloister("simulate", output=str(tmp_path / "run"), resume=True)
        assert found.code == 2
        assert "'north'" in found.err
        assert "east" not in found.err
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    file.write_text(kept, "utf-8")
    assert cloister("simulate", output=str(tmp_path / "run"), resume=True).code == 0


def test_the_fingerprint_of_the_records_stays_in_the_private_folder(options, tmp_path, material):
    begin(options, tmp_path, material)
    output = tmp_path / "run"
    with quiet_warnings():
        simulate(RunConfig.from_mapping({"output": str(output), "resume": True}))
    file = output / "state" / "data.json"
    assert file.stat().st_mode & 0o077 == 0
    secrets = [value.encode() for value in json.loads(file.read_text())["silos"].values()]
    for other in output.rglob("*"):
        if other.is_file() and other != file:
            data = other.read_bytes()
            assert not any(secret in data for secret in secrets), other


def test_a_fingerprint_file_that_is_damaged_stops_the_run(options, tmp_path, material):
    begin(options, tmp_path, material)
    (tmp_path / "run" / "state" / "data.json").write_text("{")
    with quiet_warnings(), pytest.raises(InvalidInput, match="cannot be read"):
        simulate(RunConfig.from_mapping({"output": str(tmp_path / "run"), "resume": True}))
