"""Files that hold secrets: 0600 in folders of 0700, whole or not there at all, never overwritten by accident.

Root writes on behalf of whoever owns the folder: a container's user can go on reading a list that root has replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InvalidInput, Unavailable


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600; its folders are made with mode 0700.

    Raises:
        InvalidInput: there is a file of that name.
        Unavailable: it cannot be written.
    """
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            _write(file.fileno(), path.parent, data)
    except FileExistsError as error:
        raise InvalidInput(f"{path}: exists already, and nothing is overwritten") from error
    except OSError as error:
        raise Unavailable(f"{path}: cannot be written ({error.strerror or error})") from error


def replace_private(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of ``path`` in one step: a reader sees the old file or the new one.

    Raises:
        Unavailable: it cannot be written; the old file is untouched.
    """
    try:
        make_folder(path.parent)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file.fileno(), path.parent, data)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be written ({error.strerror or error})") from error


def make_folder(path: Path) -> None:
    """Make ``path`` and what is missing above it, each of mode 0700 and owned like the folder it lies in."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    _hand_over(path, path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under ``path`` when the block ends, and leaves nothing behind when it fails.

    Raises:
        InvalidInput: ``path`` exists.
        Unavailable: it cannot be written.
    """
    if path.exists():
        raise InvalidInput(f"{path}: exists already, and nothing is overwritten")
    try:
        make_folder(path.parent)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise Unavailable(f"{path}: cannot be made ({error.strerror or error})") from error
    try:
        _hand_over(beside, path.parent)
        yield beside
        os.rename(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise Unavailable(f"{path}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def read_small(path: Path, most: int = 64 * 1024) -> bytes:
    """The content of a file that somebody else may have written.

    Raises:
        InvalidInput: it cannot be read, is no plain file, or is larger than ``most`` bytes.
    """
    try:
        if not path.is_file():
            raise InvalidInput(f"{path}: there is no such file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > most:
        raise InvalidInput(f"{path}: larger than {most} bytes")
    return data


def _write(descriptor: int, folder: Path, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _hand_over(path: Path, to_the_owner_of: Path) -> None:
    if os.geteuid() == 0:
        owner = to_the_owner_of.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
