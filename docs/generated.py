"""The parts of the reference that are read out of the code: settings, commands, exit codes, metrics.

``docs/conf.py`` puts them into the pages of ``docs/reference`` when the site is built, so they cannot be stale.

    python docs/generated.py settings     prints one part
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from client.policy import AllowedMethods, DatasetPolicy, Policy
from client.settings import FROM_RUN, TrainerSettings
from common.config import ClientSettings, RunConfig, dashed
from common.errors import CloisterError
from deploy.cli import app
from deploy.commands.options import GROUPS


def settings() -> str:
    """Every setting of a run, by the panels of ``--help``."""
    parts, panel = [], ""
    rows: list[list[str]] = []
    for name, info in RunConfig.model_fields.items():
        if name == "clients":
            continue
        if name in GROUPS:
            if rows:
                parts.append(_panel(panel, rows))
            panel, rows = GROUPS[name], []
        rows.append(_setting(name, info))
    return "\n".join([*parts, _panel(panel, rows)])


def client_settings() -> str:
    """What ``[clients.NAME]`` may hold."""
    return _table(SETTING, [_setting(name, info) for name, info in ClientSettings.model_fields.items()])


def policy() -> str:
    """The settings of an organisation's policy."""
    return _documented(Policy)


def dataset_policy() -> str:
    """The settings of one data set in a policy."""
    return _documented(DatasetPolicy)


def allowed_methods() -> str:
    """The settings of a policy's table of methods."""
    return _documented(AllowedMethods)


def trainer_settings() -> str:
    """The settings of a trainer: its own, and those that a run has too."""
    shared = ", ".join(f"`{dashed(name)}`" for name in FROM_RUN)
    own = [name for name in TrainerSettings.model_fields if name not in ("run", "kind")]
    rows = [[f"`{dashed(name)}`", *_kind_and_default(TrainerSettings.model_fields[name])] for name in own]
    return (
        f"With the meaning they have in a run: {shared}.\n\nIts own:\n\n"
        + _table(("setting", "value", "default"), rows)
        + _attributes(TrainerSettings, own)
    )


SETTING = ("setting", "value", "default", "meaning")


def _panel(panel: str, rows: list[list[str]]) -> str:
    return f"### {panel}\n\n" + _table(SETTING, rows)


def _setting(name: str, info: FieldInfo) -> list[str]:
    return [f"`{dashed(name)}`", *_kind_and_default(info), info.description or ""]


def _kind_and_default(info: FieldInfo) -> tuple[str, str]:
    value = info.default
    if value is PydanticUndefined:
        default = "needed" if info.is_required() else "–"
    elif value is None or value == () or isinstance(value, BaseModel):
        default = "–"
    else:
        default = f"`{str(value).lower() if isinstance(value, bool) else value}`"
    return _kind(info), default


WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", datetime: "date"}
LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def _kind(info: FieldInfo) -> str:
    """The values a setting takes, in words."""
    kind, bounds = _plain(info.annotation, list(info.metadata))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is dict:
        return "a table for each"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a table"
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return "list of " + ", ".join(f"`{value}`" for value in get_args(get_args(kind)[0]))
    limits = [
        f"{sign} {getattr(bound, field):g}"
        for bound in bounds
        for field, sign in LIMITS
        if isinstance(getattr(bound, field, None), int | float)
    ]
    return " ".join(["list of texts" if get_origin(kind) is tuple else WORDS[kind], *limits])


def _plain(annotation: Any, bounds: list[Any]) -> tuple[Any, list[Any]]:
    """A type without ``Annotated`` and ``| None``, and the limits that were found on the way."""
    if get_origin(annotation) is Annotated:
        inner, *found = get_args(annotation)
        return _plain(inner, bounds + [bound for one in found for bound in getattr(one, "metadata", [one])])
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (part for part in get_args(annotation) if part is not type(None))
        return _plain(inner, bounds)
    return annotation, bounds


def _documented(model: type[BaseModel]) -> str:
    rows = [[f"`{dashed(name)}`", *_kind_and_default(info)] for name, info in model.model_fields.items()]
    for row in rows:
        if model is DatasetPolicy and row[0] == "`target-delta`":
            row[2] = "see below"  # a validator works it out from the declared records
    return _table(("setting", "value", "default"), rows) + _attributes(model, model.model_fields)


def _attributes(model: type[BaseModel], names: Collection[str]) -> str:
    """The lines under ``Attributes:`` in a docstring as a list, its names written as in TOML."""
    _, _, below = inspect.getdoc(model).partition("Attributes:\n")
    text = re.sub(r"\n {6,}", " ", below)
    text = "\n".join(line for line in text.splitlines() if line.strip().partition(":")[0].split(", ")[0] in names)
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w`-]){name}(?=[:,])", f"`{dashed(name)}`", text)
    return "\n" + re.sub(r"^ +", "- ", text.replace("``", "`"), flags=re.MULTILINE) + "\n"


def leaves(command: click.Command | None = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with no commands below it, as (``cloister …``, command)."""
    found = typer.main.get_command(app) if command is None else command
    if not hasattr(found, "commands"):
        yield " ".join(("cloister", *words)), found
        return
    for name, below in found.commands.items():
        yield from leaves(below, (*words, name))


def commands() -> str:
    """Every command with its arguments and options."""
    known = {f"--{dashed(name)}" for name in RunConfig.model_fields}
    parts = ["Before any command: `--debug` shows the traceback of an error.\n"]
    for name, command in leaves():
        parts.append(f"## {name}\n\n{_prose(command.help)}\n")
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        options = [one for one in command.params if isinstance(one, click.Option)]
        if name == "cloister simulate":
            parts.append("Every [setting of a run](settings.md) is an option of the same name. Besides:\n")
            options = [one for one in options if not set(one.opts) & known]
        rows = [[f"`{one.human_readable_name}`", "", _argument_help(one)] for one in arguments]
        rows += [_option(one) for one in options]
        if rows:
            parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


def _argument_help(argument: click.Argument) -> str:
    return _prose(getattr(argument, "help", None) or "") + ("" if argument.required else " (may be left out)")


def _option(option: click.Option) -> list[str]:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    if option.required:
        default = "needed"
    else:
        default = "" if option.default in (None, False, ()) or callable(option.default) else f"`{option.default}`"
    variable = f" (or the variable `{option.envvar}`)" if option.envvar else ""
    return [flags, default, _prose(option.help) + variable]


def exit_codes() -> str:
    """Every exit code with its error, from ``common/errors.py``."""
    rows = [["0", "", "", "done"]]
    for error in sorted((CloisterError, *CloisterError.__subclasses__()), key=lambda one: one.exit_code):
        summary = (inspect.getdoc(error) or "").partition("\n\n")[0]
        if error is CloisterError:
            summary = "something failed that has no better name"
        rows.append([f"{error.exit_code}", f"`{error.__name__}`", f"`{error.grpc_status}`", _prose(summary)])
    return _table(("exit code", "error", "gRPC status", "meaning"), rows)


def metrics() -> str:
    """Every metric of the dashboard's ``/metrics``, with its labels."""
    from server.dashboard.metrics import METRICS

    rows = [[f"`{name}`", ", ".join(labels), meaning] for name, (meaning, labels) in METRICS.items()]
    return _table(("metric", "labels", "meaning"), rows)


def _prose(text: str | None) -> str:
    """Help as Markdown in one paragraph per paragraph: literals in single backticks."""
    paragraphs = (text or "").replace("``", "`").replace("\b\n", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "client-settings": client_settings,
    "policy": policy,
    "dataset-policy": dataset_policy,
    "allowed-methods": allowed_methods,
    "trainer-settings": trainer_settings,
    "commands": commands,
    "exit-codes": exit_codes,
    "metrics": metrics,
}
"""Name in ``<!-- generated: NAME -->`` → what makes the Markdown."""

if __name__ == "__main__":
    print(PARTS[sys.argv[1]]())
