"""``cloister backbone pack|verify``: a model as a folder that can be carried to a machine without a network.

The folder has a manifest in the format of ``sha256sum -c``; its one hash, ``client.backbone.backbone_hash``, is what an
organisation's policy allows. The manifest guards the way; the policy's hash is what the trainer checks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from common.errors import InvalidInput, Refused, Unavailable

backbone_app = typer.Typer(name="backbone", help="Carry a model to a machine without a network.", no_args_is_help=True)

MANIFEST = "MANIFEST.sha256"
"""Its ending is none that counts for the hash."""

ALONGSIDE = ("README.md", "LICENSE", "LICENSE.md", "NOTICE")
"""Files that are carried along although they do not count: a model's terms go with it."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@backbone_app.callback()
def _backbone() -> None:
    """Carry a model to a machine without a network."""


def pack(model: str, folder: Path) -> str:
    """Copy what makes ``model`` a backbone into ``folder``, with a manifest; returns its hash.

    Args:
        model: a folder, or the id of a model whose copy is on this machine.
        folder: must not exist; it appears whole or not at all.

    Raises:
        InvalidInput: no model, one that brings code or pickles only, or ``folder`` exists.
        Unavailable: the folder cannot be written.
    """
    from client.backbone import HASHED, NOT_HASHED, backbone_hash, resolve

    source = resolve(model)
    if folder.exists():
        raise InvalidInput(f"{folder}: exists already, and nothing is overwritten")
    chosen = [
        file
        for file in sorted(source.iterdir())
        if file.is_file() and file.name != MANIFEST
        and (file.name in ALONGSIDE or (file.name.endswith(HASHED) and file.name not in NOT_HASHED))
    ]  # fmt: skip
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for file in chosen:
                shutil.copyfile(file, beside / file.name)
                (beside / file.name).chmod(0o644)
            found = backbone_hash(beside)
            if found != backbone_hash(source):
                raise Refused(f"{source}: changed while it was copied; pack it again")
            lines = [f"{file_hash(beside / file.name)}  {file.name}\n" for file in chosen]
            (beside / MANIFEST).write_text(f"# backbone {found}\n" + "".join(lines), "utf-8")
            (beside / MANIFEST).chmod(0o644)
            beside.chmod(0o755)  # a model is public: the trainer's own user must be able to read it
            os.rename(beside, folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as error:
        raise Unavailable(f"{folder}: cannot be written ({error.strerror or error})") from error
    return found


def verify(folder: Path, *, expect: str | None = None) -> tuple[str, int]:
    """Check a backbone; returns its hash and how many files the manifest vouches for (0 without one).

    Raises:
        InvalidInput: no model folder, or the manifest cannot be read.
        Refused: a file is missing, changed or not in the manifest, or the hash is another than ``expect``.
    """
    from client.backbone import backbone_hash, check

    listed = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    if listed:
        _compare(folder, listed)
    check(folder)
    found = backbone_hash(folder)
    if expect is not None and found != expect.strip().lower():
        raise Refused(f"{folder}: its hash is {found}, expected {expect}: this is another backbone")
    return found, len(listed)


def read_manifest(path: Path) -> dict[str, str]:
    """Name to SHA-256.

    Raises:
        InvalidInput: it is no manifest.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read ({error})") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or "/" in match[2] or match[2] in found:
            raise InvalidInput(f"{path}:{number}: not a line of a manifest")
        found[match[2]] = match[1]
    if not found:
        raise InvalidInput(f"{path}: names no file")
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _compare(folder: Path, listed: dict[str, str]) -> None:
    there = {item.name for item in folder.iterdir()} - {MANIFEST}
    for name in sorted(listed.keys() - there):
        raise Refused(f"{folder / name}: is missing; copy the backbone again")
    for name in sorted(there - listed.keys()):
        raise Refused(f"{folder / name}: is not in the manifest; remove it, or pack the backbone again")
    for name, expected in listed.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise Refused(f"{folder / name}: is not the file that was packed; copy the backbone again")


@backbone_app.command("pack")
def _pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, or the id of a model on this machine")],
    output: Annotated[Path, typer.Option("--output", help="folder to make")],
    as_json: Json = False,
) -> None:
    """Copy a model's safetensors, configuration and tokenizer into one folder with a manifest."""
    found = pack(model, output)
    _say(output, found, as_json)


@backbone_app.command("verify")
def _verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    expect: Annotated[str | None, typer.Option("--expect", metavar="HASH", help="the hash that a policy names")] = None,
    as_json: Json = False,
) -> None:
    """Check a backbone against its manifest and print the hash that a policy allows it by."""
    found, vouched = verify(folder, expect=expect)
    _say(folder, found, as_json)
    if not vouched:
        typer.echo(f"warning: {folder} has no {MANIFEST}: only the hash above says what it is", err=True)


def _say(folder: Path, found: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "hash": found}))
    else:
        typer.echo(f'{folder}: {found}\nin a policy: backbones = ["{found}"]')
