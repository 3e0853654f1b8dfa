"""The files that a page links to: a stylesheet and one small script, both our own, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

MEDIA_TYPES = {"pages.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8"}
"""Every file there is, by name: nothing else of the folder can be asked for."""


@dataclass(frozen=True)
class Asset:
    """One file; ``tag`` changes with its bytes, so a browser may keep it for as long as the tag stays."""

    name: str
    media_type: str
    body: bytes

    @property
    def tag(self) -> str:
        """The first 16 digits of the bytes' SHA-256."""
        return hashlib.sha256(self.body).hexdigest()[:16]


@cache
def asset(name: str) -> Asset:
    """The file of that name; KeyError for any other."""
    media_type = MEDIA_TYPES[name]
    return Asset(name, media_type, (files("common.pages") / "static" / name).read_bytes())


def stylesheet() -> str:
    """The stylesheet as text, for a page that is one file."""
    return asset("pages.css").body.decode("utf-8")
