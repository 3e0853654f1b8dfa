"""The organisation's anchor is of the same kinds as the coordinator's: see ``common/anchor.py``."""

from common.anchor import Anchor, CommandAnchor, FileAnchor

__all__ = ["Anchor", "CommandAnchor", "FileAnchor"]
