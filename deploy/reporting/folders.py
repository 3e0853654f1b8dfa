"""A folder that is replaced as a whole: a kill at any moment leaves the old one or the new one.

Two renames are needed, because a folder that is not empty cannot be renamed over. Between them the new folder is whole
beside its name; ``recover_folder`` puts it there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a fresh folder, then put it in the place of ``folder``."""
    recover_folder(folder)
    write(_beside(folder))
    if folder.exists():
        folder.rename(_aside(folder))
    _beside(folder).rename(folder)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finish, or forget, a replacement that was killed; afterwards nothing lies beside ``folder``."""
    beside, aside = _beside(folder), _aside(folder)
    if aside.exists() and not folder.exists():
        # The old one was moved away, which happens only when the new one is whole.
        (beside if beside.exists() else aside).rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(beside, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".new")


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
