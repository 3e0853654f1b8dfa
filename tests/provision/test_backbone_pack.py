"""``cloister backbone``: what arrives is what was packed, under the hash that a policy names."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.backbone import backbone_hash
from common.errors import InvalidInput, Refused
from deploy.cli import app
from deploy.commands.backbone import MANIFEST, pack, verify

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "backbone"


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(str(DEMO), tmp_path / "packed")
    return tmp_path / "packed"


def test_packing_keeps_the_hash_that_policies_name(packed):
    assert verify(packed) == (backbone_hash(DEMO), 6)
    assert backbone_hash(packed) == backbone_hash(DEMO)
    assert verify(packed, expect=backbone_hash(DEMO).upper())[0] == backbone_hash(DEMO)
    again = packed.with_name("again")
    assert pack(str(packed), again) == backbone_hash(DEMO)
    assert (again / MANIFEST).read_text() == (packed / MANIFEST).read_text()


def test_sha256sum_reads_the_manifest(packed):
    """coreutils is the second witness."""
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=packed, check=True)
    (packed / "config.json").write_text("{}")
    assert subprocess.run(["sha256sum", "--check", "--status", MANIFEST], cwd=packed, check=False).returncode == 1


def test_code_and_pickles_are_left_behind(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "source")
    for name in ("modeling.py", "pytorch_model.bin", "data_config.json", "train.log"):
        (source / name).write_text("x")
    (source / "folder").mkdir()
    pack(str(source), tmp_path / "packed")
    assert {item.name for item in (tmp_path / "packed").iterdir()} == {item.name for item in DEMO.iterdir()} | {
        MANIFEST
    }


@pytest.mark.parametrize("name", sorted(item.name for item in DEMO.iterdir()))
@pytest.mark.parametrize("how", ["bit", "gone", "shorter", "folder"])
def test_every_change_on_the_way_is_named(packed, name, how):
    file = packed / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "bit":
        file.write_bytes(data)
    elif how == "shorter":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
    with pytest.raises(Refused, match=name):
        verify(packed)


def test_a_file_that_was_slipped_in_is_named(packed):
    (packed / "chat_template.jinja").write_text("{{ evil }}")
    with pytest.raises(Refused, match=r"chat_template\.jinja: is not in the manifest"):
        verify(packed)


def test_another_backbone_is_refused_by_its_hash(packed):
    with pytest.raises(Refused, match="another backbone"):
        verify(packed, expect="0" * 64)
    (packed / MANIFEST).unlink()
    assert verify(packed) == (backbone_hash(DEMO), 0)
    with pytest.raises(Refused, match="another backbone"):
        verify(packed, expect="0" * 64)


@pytest.mark.parametrize("text", ["", "# nothing\n", "nonsense\n", f"{'0' * 64}  ../config.json\n", "\udcff"])
def test_a_manifest_that_is_none_is_refused(packed, text):
    (packed / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidInput):
        verify(packed)


def test_nothing_is_overwritten_and_nothing_half_made(packed, tmp_path):
    with pytest.raises(InvalidInput, match="exists"):
        pack(str(DEMO), packed)
    with pytest.raises(InvalidInput, match="no such model"):
        pack(str(tmp_path / "none"), tmp_path / "new")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        pack(str(empty), tmp_path / "new")
    assert {item.name for item in tmp_path.iterdir()} == {"packed", "empty"}


def test_the_commands_print_the_line_for_the_policy(tmp_path):
    runner = CliRunner()
    out = runner.invoke(app, ["backbone", "pack", str(DEMO), "--output", str(tmp_path / "p")])
    assert f'backbones = ["{backbone_hash(DEMO)}"]' in out.output
    seen = runner.invoke(app, ["backbone", "verify", str(tmp_path / "p"), "--json"])
    assert json.loads(seen.output) == {"folder": str(tmp_path / "p"), "hash": backbone_hash(DEMO)}
    assert "no MANIFEST" in runner.invoke(app, ["backbone", "verify", str(DEMO)]).output
