"""The digest of the program that runs: what a certificate says was executed.

It names the code, it does not prove that this code was executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from common.errors import InvalidInput


def code_digest(*packages: str) -> str:
    """SHA-256 over the names and contents of every Python file of ``packages``, in order of their paths.

    >>> len(code_digest("common")), code_digest("common") == code_digest("common")
    (64, True)

    Raises:
        InvalidInput: a package that cannot be found.
    """
    hasher = hashlib.sha256()
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InvalidInput(f"{package}: there is no such package")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            hasher.update(f"{package}/{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            hasher.update(content)
    return hasher.hexdigest()
