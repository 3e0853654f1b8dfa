"""``--log-format text|json`` of every command that runs long (``common/logs.py`` says what a line may hold)."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated

import typer

from common import logs
from common.errors import CloisterError, InvalidInput
from common.text import shown

log = logging.getLogger(__name__)

LogFormat = Annotated[
    logs.Form,
    typer.Option(
        "--log-format",
        envvar=logs.VARIABLE,
        help="text for people, or json: one object per event on standard error, fit to be collected",
    ),
]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)\s*:\s*")


class _State:
    """Whether this process writes a JSON log, and whether it reads records."""

    is_json = False
    holds_records = False


def begin(form: logs.Form, *, holds_records: bool = False, level: int = logging.INFO) -> None:
    """Configure this process's log; ``holds_records`` as in ``common/logs.py``."""
    _State.is_json, _State.holds_records = form == "json", holds_records
    logs.configure(form, holds_records=holds_records, level=level)
    if form == "json" and holds_records:
        # transformers prints with a handler of its own, past every filter here: how many tokens a long record has, say.
        os.environ["TRANSFORMERS_VERBOSITY"] = "critical"  # read when it is loaded
        logging.getLogger("transformers").setLevel(logging.CRITICAL)  # it is loaded already


def announcer(form: logs.Form) -> Callable[[str], None]:
    """What a service tells its operator: a line on standard output, or one of the JSON log."""
    return log.info if form == "json" else typer.echo


def report(error: CloisterError) -> bool:
    """Tell the error that ends a command in the JSON log; False where there is none."""
    if not _State.is_json:
        return False
    text = str(error)
    if _State.holds_records and isinstance(error, InvalidInput):
        # The reader of a file says what it could not read, and that may be a record.
        text = "a setting, a file or a record is not usable; without --log-format json the command says which"
    log.error(text, extra={"exit_code": error.exit_code})
    return True


def report_fault(error: BaseException) -> bool:
    """Tell what nobody foresaw in the JSON log, by its type and places alone: a traceback's last line may be a record.

    False where there is no JSON log; then the traceback is for the person at the terminal.
    """
    if not _State.is_json:
        return False
    log.critical("the command ended by a fault", exc_info=error, extra={"exit_code": 1})
    return True


def child_line(service: str, line: str, now: float) -> str:
    """A line of a child's output as a line of the JSON log: ours as it is, any other with the level it begins with."""
    try:
        body = json.loads(line)
        fields = {name: body[name] for name in logs.FIELDS if name in body and name != "service"}
        head = {name: str(body[name]) for name in ("time", "level", "logger", "message")}
        return json.dumps(logs.fit(head | {"service": service} | fields), ensure_ascii=False)
    except (ValueError, TypeError, KeyError):
        pass
    plain = _COLOUR.sub("", line).rstrip()
    found = _LEVEL.match(plain)
    level = "info" if found is None else {"warn": "warning"}.get(found[1].lower(), found[1].lower())
    message = plain if found is None else plain[found.end() :]
    return logs.as_line(level, "child", message, now=now, service=service)


def coloured(line: str) -> str:
    """A child's line for a terminal: its colours and its end stay, every other sequence in it is shown escaped."""
    pieces, colours = _COLOUR.split(line), [*_COLOUR.findall(line), ""]
    return "".join(
        shown(piece, len(piece), keep="\n\t") + colour for piece, colour in zip(pieces, colours, strict=True)
    )


def child_listener(form: logs.Form) -> Callable[[str, str], None]:
    """What a supervisor does with its children's output: lines fit for a terminal, or a JSON line each.

    Flower's programs log what strangers on the network send them, so neither form lets a line through as it came.
    """
    lock = threading.Lock()

    def hear(service: str, line: str) -> None:
        with lock:
            if form == "json":
                print(child_line(service, line, time.time()), file=sys.stderr, flush=True)
            else:
                typer.echo(coloured(line), nl=False)

    return hear
