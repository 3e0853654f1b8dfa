"""Command-line options made from ``RunConfig``: one definition, so that flag, TOML key and documentation agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from common.config import RunConfig, dashed

GROUPS = {
    "data": "Data",
    "model": "Model",
    "rounds": "Rounds",
    "target_epsilon": "Privacy",
    "rank": "Adapter",
    "optimizer": "Optimisation",
    "engine": "Engine",
    "accountant": "Accountant",
    "output": "Run",
}
"""The first setting of each panel of ``--help``, in the order of ``RunConfig``."""


def with_run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function(config: RunConfig, **own)`` one option per setting of a run, and ``--config``.

    An option that was not given keeps the default (or the TOML file's value).
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "config"]
    parameters, panel = [], "Run"
    for name, info in RunConfig.model_fields.items():
        panel = GROUPS.get(name, panel)
        if name != "clients":
            parameters.append(_option(name, info, panel))
    file = typer.Option(
        "--config", help="TOML file with these settings, and a table clients.NAME for each that differs", metavar="FILE"
    )
    parameters.append(
        inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=None,
                          annotation=Annotated[Path | None, file])
    )  # fmt: skip

    def command(**given: Any) -> None:
        rest = {p.name: given.pop(p.name) for p in own}
        path = given.pop("config_file")
        overrides = {name: value for name, value in given.items() if value is not None and value is not False}
        config = RunConfig.load(path, overrides) if path else RunConfig.from_mapping(overrides)
        function(config, **rest)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*parameters, *keyword])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*parameters, *keyword]}
    return command


def _option(name: str, info: FieldInfo, panel: str) -> inspect.Parameter:
    text = info.description or ""
    if info.annotation is bool:
        option = typer.Option(f"--{dashed(name)}", help=text, rich_help_panel=panel)
        annotation: Any = Annotated[bool, option]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    kind, shown = _kind(info.annotation)
    default = "" if info.default is None or "default" in text else f" (default: {info.default})"
    option = typer.Option(
        f"--{dashed(name)}", help=text + default, rich_help_panel=panel, show_default=False, metavar=shown
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _kind(annotation: Any) -> tuple[Any, str]:
    """What the command line reads, and how ``--help`` names it; the settings check the value."""
    if get_origin(annotation) is Literal:
        return str, "|".join(map(str, get_args(annotation)))
    parts = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    first = parts[0]
    if first in (int, float):
        return first, "N" if first is int else "X"
    return str, "NAMES" if get_origin(first) is tuple else "TEXT"
