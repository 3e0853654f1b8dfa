"""Every command that docs/deployment.md and a kit's own page show is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from deploy.cli import app
from deploy.provisioning.kits import client_readme

ROOT = Path(__file__).parents[2]
KEY = "3f" * 16
PAGES = {
    "docs/deployment.md": (ROOT / "docs" / "deployment.md").read_text("utf-8"),
    "compose.yaml": "\n".join(
        line.removeprefix("#")
        for side in ("coordinator", "client")
        for line in (ROOT / "deploy" / side / "compose.yaml").read_text("utf-8").splitlines()
        if line.startswith("#   ")
    ),
}
for _has_keys in (True, False):
    _keys = {"coordinator": KEY + "==", "accountant": KEY + "=="}
    PAGES[f"kit, {_has_keys}"] = client_readme("clinic-a", "c:1", _keys, has_private_keys=_has_keys).decode()


def commands(text: str) -> list[list[str]]:
    """The words after every ``cloister`` that begins a command in a block or in backticks."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()] + re.findall(r"`([^`]+)`", joined)
    found = []
    for line in lines:
        match = re.match(r"(?:docker compose \S.* )?(cloister [a-z].*)$", line)
        if match:
            words = shlex.split(match[1], comments=True)[1:]
            found.append(["1" if word == "N" else word for word in words])
    return found


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page, text in PAGES.items() for words in commands(text)], ids=str
)
def test_the_command_exists_with_these_options(page, words):
    found, rest = typer.main.get_command(app), words
    while hasattr(found, "commands") and rest:
        assert rest[0] in found.commands, words
        found, rest = found.commands[rest[0]], rest[1:]
    if rest and not hasattr(found, "commands"):
        found.make_context("cloister", list(rest)).close()


def test_the_pages_show_commands():
    counted = {page: len(commands(text)) for page, text in PAGES.items()}
    assert counted["docs/deployment.md"] > 15
    assert min(counted.values()) >= 2
