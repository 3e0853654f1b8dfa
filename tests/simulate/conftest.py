"""Small data, a tiny model, and the command run inside the test's process."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import cli

COLOURS = ("red", "blue", "green", "white")


def records(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"prompt": f"colour {draw.randrange(100)}", "completion": draw.choice(COLOURS), "label": draw.choice("np")}
        for _ in range(count)
    ]


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> SimpleNamespace:
    """``data``: a folder of three silos; ``one``: one file with a silo column; ``public``: an evaluation set."""
    root = tmp_path_factory.mktemp("material")
    silos = {name: records(size, i) for i, (name, size) in enumerate([("east", 60), ("north", 80), ("south", 70)])}
    for name, rows in silos.items():
        jsonl(root / "silos" / f"{name}.jsonl", rows)
    every = [row | {"silo": name} for name, rows in silos.items() for row in rows]
    return SimpleNamespace(
        data=root / "silos", one=jsonl(root / "one.jsonl", every), public=jsonl(root / "public.jsonl", records(40, 9))
    )


@pytest.fixture(scope="session")
def options(material, tiny_llama):
    """options(output, **changes) -> settings of a run of seconds; a change to None leaves the setting out."""

    def make(output: Path | None, **changes) -> dict[str, object]:
        values = {
            "data": str(material.data), "eval_data": str(material.public), "model": str(tiny_llama), "rounds": 3,
            "expected_batch_size": 8, "target_modules": "q_proj,v_proj", "rank": 2, "max_length": 32, "threads": 1,
            "device": "cpu", "output": None if output is None else str(output),
        }  # fmt: skip
        return {name: value for name, value in (values | changes).items() if value is not None}

    return make


def as_arguments(values: dict[str, object]) -> list[str]:
    arguments = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [] if value is False else [flag, str(value)]
    return arguments


@pytest.fixture
def cloister(monkeypatch, capsys):
    """cloister(*arguments, **settings) -> exit code, standard output, standard error of the command."""

    def run(*arguments: str, **settings) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["cloister", *map(str, arguments), *as_arguments(settings)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = capsys.readouterr()
        code = ended.value.code
        return SimpleNamespace(code=0 if code is None else code, out=found.out, err=found.err)

    return run
