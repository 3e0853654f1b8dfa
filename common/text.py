r"""Words that somebody else chose: which are taken at the boundary, and how others are shown.

A name, a note or a reason ends in terminals, logs, pages, metrics and certificates. So there is one rule for all of
them: *one line of visible characters*. Not taken are control characters (an escape sequence moves a terminal's cursor,
a line break forges a line of a log), the invisible ones of Unicode's category Cf (a bidirectional override shows a text
in another order than it has; a zero-width space makes two names look alike), lone surrogates (no UTF-8), private
characters and every line end. A name also has no blank at either end and does not begin like a spreadsheet's formula.

What must be refused is refused where it comes in (``name``, ``line``). What must be shown all the same, an error's
words for instance, is shown with such characters escaped (``shown``).

>>> name("client", "clinic-a")
'clinic-a'
>>> shown("done\x1b[2K\rall is well")
'done\\x1b[2K\\x0dall is well'
>>> line("note", "two\nlines")
Traceback (most recent call last):
    ...
common.errors.InvalidInput: the note 'two\x0alines' must be one line of visible characters
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from common.errors import InvalidInput

MOST_NAME, MOST_LINE, MOST_SHOWN = 256, 4_000, 500
"""Characters of a name, of a line that is kept, and of one that is shown."""

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_FORMULA = ("=", "+", "-", "@")


def is_visible(text: str) -> bool:
    """Whether a text is one line of visible characters."""
    return (text.isascii() and text.isprintable()) or not any(unicodedata.category(one) in _UNSEEN for one in text)


def name(what: str, text: object) -> str:
    """A name that somebody else gave: 1 to 256 visible characters.

    Raises:
        InvalidInput: it is none; ``what`` says which.
    """
    if not isinstance(text, str) or not 0 < len(text) <= MOST_NAME:
        raise InvalidInput(f"the {what} must be a text of 1 to {MOST_NAME} characters")
    _refuse_unseen(what, text)
    if text != text.strip() or text.startswith(_FORMULA):
        raise InvalidInput(f"the {what} {_quoted(text)} must have no blank at its ends, and not begin with = + - or @")
    return text


def token(what: str, text: object) -> str:
    """A key, hash, signature or id that somebody else gave: at most 256 visible characters, none where there is none.

    Raises:
        InvalidInput: it is none; ``what`` says which.
    """
    return _visible(what, text, MOST_NAME)


def line(what: str, text: object) -> str:
    """A sentence that somebody else wrote: at most 4,000 visible characters.

    Raises:
        InvalidInput: it is none; ``what`` says which.
    """
    return _visible(what, text, MOST_LINE)


def every_line(what: str, value: Any) -> None:
    """Every text inside a JSON value, keys included, is a line.

    Raises:
        InvalidInput: one is none.
    """
    if isinstance(value, str):
        line(what, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            line(what, key)
            every_line(f"{what}: {key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            every_line(what, item)


def shown(text: object, most: int = MOST_SHOWN, *, keep: str = "") -> str:
    """Any text as one line of visible characters: others are escaped, and what is too long is cut.

    Args:
        text: to show.
        most: characters of it that are kept.
        keep: characters that stay as they are, for example line breaks on a terminal.
    """
    whole = str(text)
    cut = whole[:most]
    safe = cut if is_visible(cut) else "".join(one if one in keep else _escaped(one) for one in cut)
    return safe if len(whole) <= most else f"{safe} … ({len(whole)} characters)"


def _visible(what: str, text: object, most: int) -> str:
    if not isinstance(text, str) or len(text) > most:
        raise InvalidInput(f"the {what} must be a text of at most {most} characters")
    _refuse_unseen(what, text)
    return text


def _refuse_unseen(what: str, text: str) -> None:
    if not is_visible(text):
        raise InvalidInput(f"the {what} {_quoted(text)} must be one line of visible characters")


def _quoted(text: str) -> str:
    return f"'{shown(text, 80)}'"


def _escaped(one: str) -> str:
    if unicodedata.category(one) not in _UNSEEN:
        return one
    number = ord(one)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
